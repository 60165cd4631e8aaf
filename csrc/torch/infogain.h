// The label-similarity matrix H between tensors and kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../cpu/softmax_infogain.h"
#include "common.h"

namespace lgd {

// H's parts; absent where H has no such part.
struct InfogainTensors {
  OptionalTensor matrix, background, diagonal, crow, col, values;
};

// H's tensors as the kernels of a device want them. Keeps converted copies alive while `view` is used.
template <typename Acc, typename View = InfogainView>
struct Infogain {
  static constexpr bool on_cpu = std::is_same_v<View, InfogainView>;
  View view;
  at::Tensor matrix, background, diagonal, crow, col, values;

  Infogain(const InfogainTensors& h, at::Device device, int64_t classes) {
    check_devices(h, device);
    view.n_rows = classes;
    if (h.matrix) {
      take_matrix(*h.matrix, classes);
    }
    if (h.background) {
      take_background(*h.background);
    }
    if (h.diagonal) {
      take_diagonal(*h.diagonal, classes);
    }
    if (h.values) {
      take_stored_values(h, classes);
    }
    if constexpr (on_cpu) { // the CUDA kernels know by themselves
      static const Acc one = 1;
      const bool identity = !h.matrix && !h.background && !h.diagonal && !h.values;
      view.diagonal = identity ? &one : view.diagonal;
    }
  }

 private:
  static void check_devices(const InfogainTensors& h, at::Device device) {
    const std::pair<const OptionalTensor*, const char*> parts[] = {
        {&h.matrix, "matrix"}, {&h.background, "background"}, {&h.diagonal, "diagonal"}, {&h.crow, "crow"},
        {&h.col, "col"},       {&h.values, "values"}};
    for (const auto& [part, name] : parts) {
      if (*part) {
        check_device(**part, device, name);
      }
    }
  }

  static constexpr at::ScalarType kAcc = std::is_same_v<Acc, double> ? at::kDouble : at::kFloat;

  void take_matrix(const at::Tensor& given, int64_t classes) {
    TORCH_CHECK_VALUE(
        given.dim() == 2 && given.size(1) == classes, "matrix: expected shape (rows, ", classes, "), got ",
        given.sizes());
    // the CPU's kernels read every dtype
    const bool as_it_is = on_cpu || (kAcc == at::kFloat && given.scalar_type() == at::kBFloat16);
    matrix = as_it_is ? given : given.to(kAcc);
    view.n_rows = matrix.size(0);
    view.matrix = matrix.const_data_ptr();
    view.matrix_dtype = dtype_of_tensor(matrix, "matrix");
    view.matrix_row_stride = matrix.stride(0);
    view.matrix_class_stride = matrix.stride(1);
  }

  void take_background(const at::Tensor& given) {
    if constexpr (on_cpu) {
      view.background = given.item<double>();
    } else {
      background = given.to(kAcc);
      view.background = background.const_data_ptr();
    }
  }

  void take_diagonal(const at::Tensor& given, int64_t classes) {
    TORCH_CHECK_VALUE(
        given.dim() == 0 || (given.dim() == 1 && given.size(0) == classes), "diagonal: expected shape () or (", classes,
        ",), got ", given.sizes());
    diagonal = given.to(kAcc);
    view.diagonal = diagonal.const_data_ptr();
    view.diagonal_stride = diagonal.dim() == 0 ? 0 : diagonal.stride(0);
  }

  void take_stored_values(const InfogainTensors& h, int64_t classes) {
    TORCH_CHECK_VALUE(
        h.crow && h.col && h.crow->size(0) == classes + 1 && h.col->size(0) == h.values->size(0),
        "crow, col, values: not the CSR indices and values of a matrix with ", classes, " rows");
    crow = h.crow->to(at::kLong).contiguous();
    col = h.col->to(at::kLong).contiguous();
    values = h.values->to(kAcc).contiguous();
    view.crow = crow.const_data_ptr<int64_t>();
    view.col = col.const_data_ptr<int64_t>();
    view.values = values.const_data_ptr();
  }
};

} // namespace lgd
