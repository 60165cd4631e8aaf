// Layers as the kernels of decoupled training see them, on every device.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lgd {

// A matrix with contiguous rows that start `stride` elements apart. Absent when `data` is null.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t stride = 0;
};

// What is given for every layer; the code is a position in lgd_kernels.reference.ACTIVATIONS.
struct LayerOptions {
  int64_t activation = 0;
  double rho = 1, skip = 0, branch_scale = 1, dual_step = 0;
};

// The code is a position in lgd_kernels.reference.HIDDEN_LOSSES.
struct HiddenLoss {
  int64_t code = 0;
  double kappa = 1;
};

// What stands around the raw logits of a layer, each (n, d); absent or not wanted where the data is null. An output may
// be the input of the same name: every element is read before it is written.
struct ResidualIo {
  Matrix target, multiplier, skip_input;     // in
  Matrix new_multiplier, residual, delta, q; // out
};

} // namespace lgd
