// The CPU kernels of decoupled_linear on raw pointers. The mathematics is in lgd_kernels/reference/decoupled_linear.py.
#pragma once

#include <cstdint>

#include "layers.h"

namespace lgd {

// What both passes read, for T layers of one shape. Acc, the accumulation type, is double for float64 and float
// otherwise.
template <typename Acc>
struct LinearLayers {
  int64_t n_layers = 0, n_samples = 0, d_in = 0, d_out = 0;
  bool preactivation = false;
  const LayerOptions* options = nullptr; // (T,)
  Stack z;                               // (T, n, d_in)
  Stack operand;                         // phi(z) as the products take it, in Acc
  Stack weight;                          // (T, d_out, d_in), in Acc
};

// operand.data = phi(z), rounded to `rounded_to` on the way.
template <typename Acc>
struct LinearOperand {
  LinearLayers<Acc> layers;
  DType rounded_to;
};

// Outputs whose data is null are not wanted.
template <typename Acc>
struct DecoupledLinear {
  LinearLayers<Acc> layers;
  HiddenLoss hidden_loss;
  Stack bias; // (T, 1, d_out), in Acc
  Stack target, multiplier;
  Stack residual, delta, q;     // out, (T, n, d_out)
  Acc* energy = nullptr;        // (T,), out
  double* row_energy = nullptr; // (T * n,), working space
};

template <typename Acc>
struct DecoupledLinearBackward {
  LinearLayers<Acc> layers;
  Stack delta;                      // (T, n, d_out), in Acc
  Stack q;                          // (T, n, d_out)
  const Acc* grad_energy = nullptr; // (T,), or null for 1
  Stack grad_z, grad_weight;        // out
  Stack grad_bias;                  // out, (T, 1, d_out)
};

#define LGD_DECLARE_DECOUPLED_LINEAR(Acc)             \
  void fill_operand(const LinearOperand<Acc>&);       \
  void decoupled_linear(const DecoupledLinear<Acc>&); \
  void decoupled_linear_backward(const DecoupledLinearBackward<Acc>&);

#ifndef CPU_CAPABILITY // the glue; the vector code defines one of them, in an inline namespace
#define LGD_DECLARE_FOR(CAPABILITY)    \
  namespace CAPABILITY {               \
  LGD_DECLARE_DECOUPLED_LINEAR(float)  \
  LGD_DECLARE_DECOUPLED_LINEAR(double) \
  }

LGD_DECLARE_FOR(DEFAULT)
LGD_DECLARE_FOR(AVX2)
LGD_DECLARE_FOR(AVX512)
#endif

#undef LGD_DECLARE_FOR
#undef LGD_DECLARE_DECOUPLED_LINEAR

} // namespace lgd
