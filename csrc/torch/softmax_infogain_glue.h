// The functions of softmax_infogain between tensors and kernels, as far as they are the same for every device.
//
// A Device has the accumulation type Acc, the number kMostClasses, the kernels' structs Input, Output and
// DoubleBackward, and static functions: `empty_like` makes a gradient, `run` calls a kernel on a Call, and `agree` says
// whether it is known already that two per-row tensors are equal.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

#include "../common/views.h"
#include "infogain.h"
#include "softmax_infogain.h"

namespace lgd {

inline Rows rows_of(const at::Tensor& tensor, const char* name) {
  return {
      const_cast<void*>(tensor.const_data_ptr()), dtype_of_tensor(tensor, name), tensor.stride(0), tensor.stride(1),
      tensor.stride(2)};
}

template <typename T>
PerRow<T> per_row(const at::Tensor& tensor) {
  return {const_cast<T*>(tensor.const_data_ptr<std::remove_const_t<T>>()), tensor.stride(0), tensor.stride(1)};
}

// An input with one element for every row of the logits.
template <typename T>
PerRow<const T> row_input(const RowArguments& rows, const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(
      tensor.dim() == 2 && tensor.size(0) == rows.logits.size(0) && tensor.size(1) == rows.logits.size(2), name,
      ": expected shape (", rows.logits.size(0), ", ", rows.logits.size(2), "), got ", tensor.sizes());
  check_device(tensor, rows.logits.device(), name);
  return per_row<const T>(tensor);
}

template <typename T>
PerRow<const T> row_input(const RowArguments& rows, const OptionalTensor& tensor, const char* name) {
  return tensor ? row_input<T>(rows, *tensor, name) : PerRow<const T>{};
}

// A tensor in the shape of the logits.
inline Rows like_logits(const RowArguments& rows, const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == rows.logits.sizes(), name, ": expected shape ", rows.logits.sizes(), ", got ", tensor.sizes());
  check_device(tensor, rows.logits.device(), name);
  return rows_of(tensor, name);
}

template <typename Acc>
at::TensorOptions options_of_rows(const at::Tensor& logits) {
  return logits.options().dtype(c10::CppTypeToScalarType<Acc>::value);
}

// An uninitialized output with one element for every row; one without elements if it is not wanted.
template <typename Acc>
at::Tensor empty_per_row(const at::Tensor& logits, bool wanted = true) {
  const at::TensorOptions options = options_of_rows<Acc>(logits);
  return wanted ? at::empty({logits.size(0), logits.size(2)}, options) : at::empty({0}, options);
}

// The input of one call of a kernel, and the tensors that it points into.
template <typename Device>
class Call {
 public:
  using Acc = typename Device::Acc;
  using Input = typename Device::Input;

  explicit Call(const RowArguments& rows)
      : logits(rows.logits), labels(rows.labels), infogain_(rows.h, rows.logits.device(), rows.logits.size(1)) {
    TORCH_CHECK_VALUE(logits.dim() == 3, "logits: expected shape (O, C, I), got ", logits.sizes());
    TORCH_CHECK_VALUE(
        labels.dim() == 2 && labels.size(0) == logits.size(0) && labels.size(1) == logits.size(2),
        "labels: expected shape (", logits.size(0), ", ", logits.size(2), "), got ", labels.sizes());
    TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels: dtype must be int64, got ", labels.scalar_type());
    check_device(labels, logits.device(), "labels");
    TORCH_CHECK_VALUE(
        logits.size(1) <= Device::kMostClasses, "logits: at most ", Device::kMostClasses,
        " classes are supported on this device, got ", logits.size(1));
    input.outer = logits.size(0);
    input.classes = static_cast<decltype(input.classes)>(logits.size(1));
    input.inner = logits.size(2);
    input.logits = rows_of(logits, "logits");
    input.labels = per_row<const int64_t>(labels);
    input.ignore_index = rows.ignore_index;
    input.infogain = infogain_.view;
    input.z_loss = static_cast<Acc>(rows.z_loss);
  }

  bool empty() const { return input.outer == 0 || input.inner == 0; }

  const at::Tensor logits, labels;
  Input input;

 private:
  Infogain<Acc, decltype(Input::infogain)> infogain_;
};

template <typename Device>
struct SoftmaxInfogain {
  using Acc = typename Device::Acc;
  using Output = typename Device::Output;

  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
      const RowArguments& rows, const OptionalTensor& row_scale, bool need_lse, bool need_norm) {
    Call<Device> call(rows);
    const at::Tensor loss = empty_per_row<Acc>(rows.logits), lse = empty_per_row<Acc>(rows.logits, need_lse),
                     norm = empty_per_row<Acc>(rows.logits, need_norm),
                     grad = row_scale ? Device::empty_like(rows.logits) : at::empty({0}, rows.logits.options());
    Output out;
    out.loss = per_row<Acc>(loss);
    if (need_lse) {
      out.lse = per_row<Acc>(lse);
    }
    if (need_norm) {
      out.norm = per_row<Acc>(norm);
    }
    if (row_scale) {
      want_gradient(rows, out, grad, *row_scale, std::nullopt);
    }
    Device::run(call, out);
    return {loss, lse, grad, norm};
  }

  static void backward(
      const RowArguments& rows, const at::Tensor& grad_loss, const OptionalTensor& grad_lse,
      const OptionalTensor& made_for, const at::Tensor& grad) {
    like_logits(rows, grad, "grad");
    if (made_for && !grad_lse && Device::agree(grad_loss, *made_for)) {
      return;
    }
    Call<Device> call(rows);
    Output out;
    want_gradient(rows, out, grad, grad_loss, grad_lse);
    out.made_for = row_input<Acc>(rows, made_for, "row_scale");
    Device::run(call, out);
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> double_backward(
      const RowArguments& rows, const at::Tensor& grad_loss, const OptionalTensor& grad_lse,
      const at::Tensor& grad_grad) {
    Call<Device> call(rows);
    const at::Tensor vector = grad_grad.to(rows.logits.scalar_type()), grad_logits = Device::empty_like(rows.logits),
                     grad_grad_loss = empty_per_row<Acc>(rows.logits), grad_grad_lse = at::empty_like(grad_grad_loss);
    typename Device::DoubleBackward io;
    io.grad_loss = row_input<Acc>(rows, grad_loss, "grad_loss");
    io.grad_lse = row_input<Acc>(rows, grad_lse, "grad_lse");
    io.grad_grad = like_logits(rows, vector, "grad_grad");
    io.grad_logits = rows_of(grad_logits, "logits");
    io.grad_grad_loss = per_row<Acc>(grad_grad_loss);
    io.grad_grad_lse = per_row<Acc>(grad_grad_lse);
    Device::run(call, io);
    return {grad_logits, grad_grad_loss, grad_grad_lse};
  }

 private:
  static void want_gradient(
      const RowArguments& rows, Output& out, const at::Tensor& grad, const at::Tensor& grad_loss,
      const OptionalTensor& grad_lse) {
    out.grad = like_logits(rows, grad, "grad");
    out.grad_loss = row_input<Acc>(rows, grad_loss, "grad_loss");
    out.grad_lse = row_input<Acc>(rows, grad_lse, "grad_lse");
  }
};

} // namespace lgd
