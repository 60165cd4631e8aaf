// The label-similarity matrix H between tensors and kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <type_traits>

#include "../cpu/softmax_infogain.h"
#include "common.h"

namespace lgd {

// H's parts; absent where H has no such part.
struct InfogainTensors {
  OptionalTensor matrix, background, diagonal, crow, col, values;
};

// H's tensors as the kernels want them. Keeps converted copies alive while `view` is used.
template <typename Acc>
struct Infogain {
  InfogainView view;
  at::Tensor diagonal, crow, col, values;

  Infogain(const InfogainTensors& h, int64_t classes) {
    constexpr at::ScalarType acc = std::is_same_v<Acc, double> ? at::kDouble : at::kFloat;
    view.n_rows = classes;
    if (h.matrix) {
      TORCH_CHECK_VALUE(
          h.matrix->dim() == 2 && h.matrix->size(1) == classes, "matrix: expected shape (rows, ", classes, "), got ",
          h.matrix->sizes());
      view.n_rows = h.matrix->size(0);
      view.matrix = h.matrix->const_data_ptr();
      view.matrix_dtype = dtype_of_tensor(*h.matrix, "matrix");
      view.matrix_row_stride = h.matrix->stride(0);
      view.matrix_class_stride = h.matrix->stride(1);
    }
    if (h.background) {
      view.background = h.background->item<double>();
    }
    const bool identity = !h.matrix && !h.background && !h.diagonal && !h.values;
    if (h.diagonal) {
      TORCH_CHECK_VALUE(
          h.diagonal->dim() == 0 || (h.diagonal->dim() == 1 && h.diagonal->size(0) == classes),
          "diagonal: expected shape () or (", classes, ",), got ", h.diagonal->sizes());
      diagonal = h.diagonal->to(acc);
      view.diagonal = diagonal.const_data_ptr();
      view.diagonal_stride = diagonal.dim() == 0 ? 0 : diagonal.stride(0);
    } else if (identity) {
      static const Acc one = 1;
      view.diagonal = &one;
    }
    if (h.values) {
      TORCH_CHECK_VALUE(
          h.crow && h.col && h.crow->size(0) == classes + 1 && h.col->size(0) == h.values->size(0),
          "crow, col, values: not the CSR indices and values of a matrix with ", classes, " rows");
      crow = h.crow->to(at::kLong).contiguous();
      col = h.col->to(at::kLong).contiguous();
      values = h.values->to(acc).contiguous();
      view.crow = crow.const_data_ptr<int64_t>();
      view.col = col.const_data_ptr<int64_t>();
      view.values = values.const_data_ptr();
    }
  }
};

} // namespace lgd
