// A call of local_residual, on every device.
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
  double* tile_energy = nullptr; // working space: on a CPU (T * n,), on a GPU as cuda/local_residual.h says
};

} // namespace lgd
