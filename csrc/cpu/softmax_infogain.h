// The CPU kernels of softmax_infogain on raw pointers. The mathematics is in lgd_kernels/reference/softmax_infogain.py.
#pragma once

#include <cstdint>

#include "../common/views.h"

namespace lgd {

// H = matrix + background + diagonal, then the stored values take the place of what is there. Pointers are null where
// H has no such part; diagonal and values are of the accumulation type.
struct InfogainView {
  const void* matrix = nullptr; // (n_rows, C)
  DType matrix_dtype = DType::Float32;
  int64_t matrix_row_stride = 0, matrix_class_stride = 0;
  double background = 0;
  const void* diagonal = nullptr; // (C,); stride 0 for one value
  int64_t diagonal_stride = 0;
  const int64_t* crow = nullptr; // CSR
  const int64_t* col = nullptr;
  const void* values = nullptr;
  int64_t n_rows = 0; // valid labels are 0 <= l < n_rows
};

// What every kernel reads. Acc, the accumulation type, is double for float64 logits and float otherwise; per-row inputs
// and outputs other than labels are of that type.
template <typename Acc>
struct SoftmaxInfogainInput {
  int64_t outer = 0, classes = 0, inner = 0;
  Rows logits;
  PerRow<const int64_t> labels;
  int64_t ignore_index = -100;
  InfogainView infogain;
  double z_loss = 0;
  // Set to the first position (o * I + i) whose label is out of range, if there is one; start it at INT64_MAX.
  int64_t* first_bad_label = nullptr;
};

// Outputs whose data is null are not wanted. The gradient of a row is for the upstream gradients grad_loss and grad_lse
// (absent: 0). Where `made_for` is present, `grad` already holds the gradient for grad_loss = made_for, grad_lse = 0,
// and only rows for which that differs are written.
template <typename Acc>
struct SoftmaxInfogainOutput {
  PerRow<Acc> loss, lse, norm;
  Rows grad;
  bool stream_grad = false; // write around the cache
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
  Acc* max = nullptr;     // (O * I,), working space
  Acc* log_sum = nullptr; // (O * I,), working space
  Acc* result = nullptr;  // (n_rows, C), zeroed
};

#define LGD_DECLARE_SOFTMAX_INFOGAIN(Acc)                                                                             \
  void softmax_infogain(const SoftmaxInfogainInput<Acc>&, const SoftmaxInfogainOutput<Acc>&);                         \
  void softmax_infogain_double_backward(const SoftmaxInfogainInput<Acc>&, const SoftmaxInfogainDoubleBackward<Acc>&); \
  void softmax_infogain_backward_matrix(const SoftmaxInfogainInput<Acc>&, const SoftmaxInfogainBackwardMatrix<Acc>&);

#ifndef CPU_CAPABILITY // the glue; the vector code defines one of them, in an inline namespace
#define LGD_DECLARE_FOR(CAPABILITY)    \
  namespace CAPABILITY {               \
  LGD_DECLARE_SOFTMAX_INFOGAIN(float)  \
  LGD_DECLARE_SOFTMAX_INFOGAIN(double) \
  }

LGD_DECLARE_FOR(DEFAULT)
LGD_DECLARE_FOR(AVX2)
LGD_DECLARE_FOR(AVX512)
#undef LGD_DECLARE_FOR
#else
inline namespace CPU_CAPABILITY {
LGD_DECLARE_SOFTMAX_INFOGAIN(float)
LGD_DECLARE_SOFTMAX_INFOGAIN(double)
} // namespace CPU_CAPABILITY
#endif

#undef LGD_DECLARE_SOFTMAX_INFOGAIN

} // namespace lgd
