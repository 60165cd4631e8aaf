// The CUDA kernels of softmax_infogain on raw device pointers. The mathematics is in
// lgd_kernels/reference/softmax_infogain.py.
//
// Each function starts its kernels on `stream` (a cudaStream_t), allocates nothing, waits for nothing and returns a
// cudaError_t. There is at least one row and one class. Class axes of any stride are served; the gradient, grad_grad
// and grad_logits have the logits' dtype and may not overlap them. Results are the same in every run, and a row's bits
// depend on the row and the configuration alone.
#pragma once

#include <cstdint>

#include "../common/views.h"
#include "softmax_infogain_config.h"

namespace lgd::gpu {

// H = matrix + background + diagonal, then the stored values take the place of what is there; the identity where all
// are null. The matrix is of the accumulation type, or bfloat16 where that is float, and excludes a background;
// background, diagonal and values are of the accumulation type. Also what is one number is on the device: reading it on
// the host would wait for the stream.
struct InfogainView {
  const void* matrix = nullptr; // (n_rows, C)
  DType matrix_dtype = DType::Float32;
  int64_t matrix_row_stride = 0, matrix_class_stride = 0;
  const void* background = nullptr; // ()
  const void* diagonal = nullptr;   // (C,); stride 0 for one value
  int64_t diagonal_stride = 0;
  const int64_t* crow = nullptr; // CSR, columns ascending in each row
  const int64_t* col = nullptr;
  const void* values = nullptr;
  int64_t n_rows = 0; // valid labels are 0 <= l < n_rows
};

// What every kernel reads. Acc, the accumulation type, is double for float64 logits and float otherwise; per-row inputs
// and outputs other than labels are of that type. At most 2^30 classes, so that an int reaches beyond the last one.
template <typename Acc>
struct SoftmaxInfogainInput {
  int64_t outer = 0, inner = 0;
  int classes = 0;
  Rows logits;
  PerRow<const int64_t> labels;
  int64_t ignore_index = -100;
  InfogainView infogain;
  Acc z_loss = 0;
};

// Outputs whose data is null are not wanted. The gradient of a row is for the upstream gradients grad_loss and grad_lse
// (absent: 0). Where `made_for` is present, `grad` already holds the gradient for grad_loss = made_for, grad_lse = 0,
// and where they agree it stays as it is. A row whose label is out of range has loss NaN and gradient 0.
template <typename Acc>
struct SoftmaxInfogainOutput {
  PerRow<Acc> loss, lse, norm;
  PerRow<Acc> max, log_sum; // lse = max + log_sum
  Rows grad;
  PerRow<const Acc> grad_loss, grad_lse, made_for;
};

template <typename Acc>
struct SoftmaxInfogainDoubleBackward {
  PerRow<const Acc> grad_loss, grad_lse;
  Rows grad_grad;                            // in
  Rows grad_logits;                          // out
  PerRow<Acc> grad_grad_loss, grad_grad_lse; // out
};

template <typename Acc>
struct SoftmaxInfogainBackwardMatrix {
  PerRow<const Acc> grad_loss;
  PerRow<const Acc> max, log_sum; // as the forward kernel writes them
  Acc* result = nullptr;          // (n_rows, C)
};

// The configuration for an input and its gradient (whose data is null if it is not wanted); see
// softmax_infogain_config.h. A launch refuses one that does not fit.
template <typename Acc>
Configuration configuration_of(const SoftmaxInfogainInput<Acc>& in, const Rows& grad, int compute_capability);

template <typename Acc>
int softmax_infogain(
    SoftmaxInfogainInput<Acc> in, SoftmaxInfogainOutput<Acc> out, const Configuration& configuration, void* stream);

template <typename Acc>
int softmax_infogain_double_backward(
    SoftmaxInfogainInput<Acc> in, SoftmaxInfogainDoubleBackward<Acc> io, const Configuration& configuration,
    void* stream);

template <typename Acc>
int softmax_infogain_backward_matrix(
    const SoftmaxInfogainInput<Acc>& in, const SoftmaxInfogainBackwardMatrix<Acc>& io, void* stream);

} // namespace lgd::gpu
