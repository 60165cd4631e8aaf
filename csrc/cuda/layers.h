// What the launches over layers share: their table of layers, and the sum of a layer's energy.
#pragma once

#include <cstdint>

namespace lgd::gpu {

// A launch has its table of layers as a parameter, which costs no copy to the device and is kept by a CUDA graph; more
// layers take several launches.
constexpr int kMostLayers = 256;
constexpr int kMostTableBytes = 32764 - 64; // what all parameters of a kernel may have, less room for others

constexpr int64_t layers_of_launch(int64_t n_layers, int64_t first) {
  return n_layers - first < kMostLayers ? n_layers - first : kMostLayers;
}

// *energies[t] = the sum of parts[t], (n_layers, n_parts), in an order that depends on n_parts alone; at most
// kMostLayers layers. Returns a cudaError_t.
template <typename Acc>
int sum_energies(const double* parts, int64_t n_parts, Acc* const* energies, int64_t n_layers, void* stream);

} // namespace lgd::gpu
