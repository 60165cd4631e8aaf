// How the CPU kernels cut a layer into tiles.
#pragma once

#include <cstdint>

#include "../common/layers.h"

namespace lgd {

// A layer's energy is summed tile by tile, in an order that depends on its shape alone.
constexpr int64_t kRows = 64;  // samples of a tile
constexpr int64_t kPanel = 64; // outputs of a tile of decoupled_linear
constexpr int64_t energy_tiles(int64_t n_samples, int64_t d_out) {
  return (n_samples + kRows - 1) / kRows * ((d_out + kPanel - 1) / kPanel);
}

} // namespace lgd
