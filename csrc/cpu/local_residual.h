// The CPU kernel of local_residual on raw pointers. The mathematics is in lgd_kernels/reference/local_residual.py.
#pragma once

#include <cstdint>

#include "layers.h"

namespace lgd {

// Outputs whose data is null are not wanted. Acc, the accumulation type, is double for float64 logits and float
// otherwise.
template <typename Acc>
struct LocalResidual {
  int64_t n_layers = 0, n_samples = 0, n_units = 0;
  Stack logits, target, multiplier, skip_input; // in
  const LayerOptions* options = nullptr;        // (T,)
  HiddenLoss hidden_loss;
  Stack residual, delta, q;     // out
  Acc* energy = nullptr;        // (T,), out
  double* row_energy = nullptr; // (T * n,), working space
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
