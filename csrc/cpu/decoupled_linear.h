// The CPU kernels of decoupled_linear on raw pointers. The mathematics is in lgd_kernels/reference/decoupled_linear.py.
#pragma once

#include <cstdint>

#include "layers.h"

namespace lgd {

// A linear layer, a = branch_scale * phi(z) W^T + b. Acc, the accumulation type, is double for float64 and float
// otherwise.
struct LinearLayer {
  int64_t n_samples = 0, d_in = 0, d_out = 0;
  bool preactivation = false; // whether the activation is phi; else it is f, which follows the raw logits
  LayerOptions options;
  Matrix z;            // (n, d_in)
  bool narrow = false; // whether the products take bfloat16: then operand and delta are, the weight may be (else all
                       // are in Acc, but delta in any dtype), and d_in and d_out are even
  Matrix operand;      // phi(z) as the products take it: z itself, or working space
  DType operand_dtype; // what phi(z) is rounded to
  Matrix weight;       // (d_out, d_in)
  Matrix bias;         // (1, d_out), in Acc, or absent
};

struct DecoupledLinearLayer {
  LinearLayer linear;
  ResidualIo io;
  double* tile_energy = nullptr; // working space, one for each tile of kRows x kPanel
};

template <typename Acc>
struct DecoupledLinear {
  const DecoupledLinearLayer* layers = nullptr;
  int64_t n_layers = 0;
  HiddenLoss hidden_loss;
  Acc* energy = nullptr; // (T,), out
};

// Outputs whose data is null are not wanted, and what only they need may be absent.
struct DecoupledLinearBackwardLayer {
  LinearLayer linear;
  Matrix residual, delta, q;           // (n, d_out)
  double upstream = 1;                 // the gradient of the layer's energy
  Matrix grad_z, grad_weight;          // out
  Matrix grad_bias;                    // out, (1, d_out)
  Matrix grad_target, grad_multiplier; // out
};

template <typename Acc>
struct DecoupledLinearBackward {
  const DecoupledLinearBackwardLayer* layers = nullptr;
  int64_t n_layers = 0;
};

#define LGD_DECLARE_DECOUPLED_LINEAR(Acc)             \
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
