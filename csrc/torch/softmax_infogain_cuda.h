// softmax_infogain on a CUDA device: nothing here waits for it.
#pragma once

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cstdint>
#include <utility>

#include "../cuda/count_labels.h"
#include "../cuda/softmax_infogain.h"
#include "cuda_device.h"
#include "softmax_infogain_glue.h"

namespace lgd {

template <typename A>
struct Cuda {
  using Acc = A;
  using Input = gpu::SoftmaxInfogainInput<Acc>;
  using Output = gpu::SoftmaxInfogainOutput<Acc>;
  using DoubleBackward = gpu::SoftmaxInfogainDoubleBackward<Acc>;

  static constexpr int64_t kMostClasses = int64_t(1) << 30;

  static at::Tensor empty_like(const at::Tensor& logits) { return at::empty_like(logits); }

  static void run(const Call<Cuda>& call, const Output& out) {
    start(call, [&](const CudaLaunch& launch) {
      return gpu::softmax_infogain(call.input, out, configuration(call, out.grad, launch), launch.stream());
    });
  }

  static void run(const Call<Cuda>& call, const DoubleBackward& io) {
    start(call, [&](const CudaLaunch& launch) {
      return gpu::softmax_infogain_double_backward(
          call.input, io, configuration(call, io.grad_logits, launch), launch.stream());
    });
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> reduced(
      const RowArguments& rows, const OptionalTensor& sample_weight, std::optional<double> divisor, bool need_grad) {
    const auto [denominator, scale] =
        divisor ? with_reciprocal(rows.logits, *divisor) : counted(rows.labels, rows.ignore_index);
    OptionalTensor row_scale;
    if (need_grad) {
      row_scale = sample_weight ? sample_weight->mul(scale) : scale.expand(rows.labels.sizes());
    }
    const auto [loss, lse, grad, norm] = SoftmaxInfogain<Cuda>::forward(rows, row_scale, false, false);
    return {(sample_weight ? loss.mul(*sample_weight) : loss).sum().div(denominator), scale, grad};
  }

  static at::Tensor backward_matrix(const RowArguments& rows, int64_t n_rows, const at::Tensor& grad_loss) {
    Call<Cuda> call(rows);
    call.input.infogain.n_rows = n_rows;
    const at::Tensor max = empty_per_row<Acc>(rows.logits), log_sum = empty_per_row<Acc>(rows.logits);
    Output terms;
    terms.max = per_row<Acc>(max);
    terms.log_sum = per_row<Acc>(log_sum);
    run(call, terms);
    const std::array<int64_t, 2> shape = {n_rows, call.input.classes};
    const at::TensorOptions options = options_of_rows<Acc>(rows.logits);
    const at::Tensor result = call.empty() ? at::zeros(shape, options) : at::empty(shape, options);
    if (result.numel() == 0) {
      return result;
    }
    gpu::SoftmaxInfogainBackwardMatrix<Acc> io;
    io.grad_loss = row_input<Acc>(rows, grad_loss, "grad_loss");
    io.max = per_row<const Acc>(max);
    io.log_sum = per_row<const Acc>(log_sum);
    io.result = result.data_ptr<Acc>();
    start(call, [&](const CudaLaunch& launch) {
      return gpu::softmax_infogain_backward_matrix(call.input, io, launch.stream());
    });
    return result;
  }

  static at::Tensor count_labels(const at::Tensor& labels, int64_t ignore_index, at::ScalarType dtype) {
    if (dtype == at::kDouble) {
      return Cuda<double>::counted(labels.reshape({-1, 1}), ignore_index).first;
    }
    return Cuda<float>::counted(labels.reshape({-1, 1}), ignore_index).first.to(dtype);
  }

  // (how many labels (O, I) are not ignored, 1 / that)
  static std::pair<at::Tensor, at::Tensor> counted(const at::Tensor& labels, int64_t ignore_index) {
    const auto options = labels.options().dtype(c10::CppTypeToScalarType<Acc>::value);
    const at::Tensor number = at::empty({}, options), reciprocal = at::empty({}, options);
    const CudaLaunch launch(labels);
    const int status = gpu::count_labels<Acc>(
        labels.size(0), labels.size(1), per_row<const int64_t>(labels), ignore_index, number.data_ptr<Acc>(),
        reciprocal.data_ptr<Acc>(), launch.compute_capability(), launch.stream());
    check_launch(status, "count_labels");
    return {number, reciprocal};
  }

  // Whether a gradient is already what it should become is decided on the device, row by row.
  static bool agree(const at::Tensor&, const at::Tensor&) { return false; }

 private:
  static gpu::Configuration configuration(const Call<Cuda>& call, const Rows& grad, const CudaLaunch& launch) {
    return gpu::configuration_of(call.input, grad, launch.compute_capability());
  }

  static std::pair<at::Tensor, at::Tensor> with_reciprocal(const at::Tensor& logits, double divisor) {
    const at::Tensor number = at::full({}, divisor, options_of_rows<Acc>(logits));
    return {number, number.reciprocal()};
  }

  template <typename Launch>
  static void start(const Call<Cuda>& call, const Launch& kernel) {
    if (!call.empty()) {
      const CudaLaunch launch(call.logits);
      check_launch(kernel(launch), "softmax_infogain");
    }
  }
};

} // namespace lgd
