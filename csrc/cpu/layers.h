// Stacks of layers as the kernels of decoupled training see them.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lgd {

// A tensor (T, n, d) with its last dimension contiguous; strides count elements. Absent when `data` is null.
struct Stack {
  void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t layer_stride = 0, row_stride = 0;
};

// What is given for every layer; the codes are positions in lgd_kernels.reference.ACTIVATIONS and HIDDEN_LOSSES.
struct LayerOptions {
  int64_t activation = 0;
  double rho = 1, skip = 0, branch_scale = 1, dual_step = 0;
};

struct HiddenLoss {
  int64_t code = 0;
  double kappa = 1;
};

} // namespace lgd
