// The functions of softmax_infogain on tensors, each answered on the device that the logits are on.

#include "softmax_infogain.h"

#include "softmax_infogain_cpu.h"
#ifdef LGD_WITH_CUDA
#include "softmax_infogain_cuda.h"
#endif

namespace lgd {
namespace {

// f(device) for the device of a tensor and the accumulation type Acc.
template <typename Acc, typename F>
auto with_device(const at::Tensor& tensor, const F& f) {
#ifdef LGD_WITH_CUDA
  if (is_on_cuda(tensor)) {
    return f(Cuda<Acc>{});
  }
#endif
  return f(Cpu<Acc>{});
}

// The same for logits.
template <typename F>
auto on_device_of(const at::Tensor& logits, const F& f) {
  return logits.scalar_type() == at::kDouble ? with_device<double>(logits, f) : with_device<float>(logits, f);
}

} // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> softmax_infogain(
    const RowArguments& rows, const OptionalTensor& row_scale, bool need_lse, bool need_norm) {
  return on_device_of(rows.logits, [&]<typename Device>(Device) {
    return SoftmaxInfogain<Device>::forward(rows, row_scale, need_lse, need_norm);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_infogain_reduced(
    const RowArguments& rows, const OptionalTensor& sample_weight, std::optional<double> divisor, bool need_grad) {
  return on_device_of(
      rows.logits, [&](auto device) { return device.reduced(rows, sample_weight, divisor, need_grad); });
}

at::Tensor softmax_infogain_backward(
    const RowArguments& rows, const at::Tensor& grad_loss, const OptionalTensor& grad_lse) {
  return on_device_of(rows.logits, [&]<typename Device>(Device) {
    const at::Tensor grad = Device::empty_like(rows.logits);
    SoftmaxInfogain<Device>::backward(rows, grad_loss, grad_lse, std::nullopt, grad);
    return grad;
  });
}

void softmax_infogain_backward_(
    const at::Tensor& grad, const at::Tensor& row_scale, const RowArguments& rows, const at::Tensor& grad_loss,
    const OptionalTensor& grad_lse) {
  on_device_of(rows.logits, [&]<typename Device>(Device) {
    SoftmaxInfogain<Device>::backward(rows, grad_loss, grad_lse, row_scale, grad);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_infogain_double_backward(
    const RowArguments& rows, const at::Tensor& grad_loss, const OptionalTensor& grad_lse,
    const at::Tensor& grad_grad) {
  return on_device_of(rows.logits, [&]<typename Device>(Device) {
    return SoftmaxInfogain<Device>::double_backward(rows, grad_loss, grad_lse, grad_grad);
  });
}

at::Tensor softmax_infogain_backward_matrix(const RowArguments& rows, int64_t n_rows, const at::Tensor& grad_loss) {
  return on_device_of(rows.logits, [&](auto device) { return device.backward_matrix(rows, n_rows, grad_loss); });
}

at::Tensor count_labels(const at::Tensor& labels, int64_t ignore_index, at::ScalarType dtype) {
  return with_device<float>(labels, [&](auto device) { return device.count_labels(labels, ignore_index, dtype); });
}

} // namespace lgd
