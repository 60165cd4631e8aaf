// The CPU kernel of local_residual on raw pointers. The mathematics is in lgd_kernels/reference/local_residual.py.
#pragma once

#include <cstdint>

#include "layers.h"

namespace lgd {

struct ResidualLayer {
  int64_t n_samples = 0, n_units = 0;
  Matrix logits; // (n, d)
  ResidualIo io;
  LayerOptions options;
};

// Acc, the accumulation type, is double for float64 logits and float otherwise.
template <typename Acc>
struct LocalResidual {
  const ResidualLayer* layers = nullptr; // T of them, of one shape
  int64_t n_layers = 0;
  HiddenLoss hidden_loss;
  Acc* energy = nullptr;         // (T,), out
  double* tile_energy = nullptr; // (T * n,), working space
};

#define LGD_DECLARE_LOCAL_RESIDUAL                  \
  void local_residual(const LocalResidual<float>&); \
  void local_residual(const LocalResidual<double>&);

#ifndef CPU_CAPABILITY // the glue; the vector code defines one of them, in an inline namespace
namespace DEFAULT {
LGD_DECLARE_LOCAL_RESIDUAL
}
namespace AVX2 {
LGD_DECLARE_LOCAL_RESIDUAL
}
namespace AVX512 {
LGD_DECLARE_LOCAL_RESIDUAL
}
#endif

#undef LGD_DECLARE_LOCAL_RESIDUAL

} // namespace lgd
