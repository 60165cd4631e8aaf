// The sum of the energies of a layer's parts, in one order.

#include "layers.h"

#include <algorithm>

#include "teams.cuh"

namespace lgd::gpu {
namespace {

constexpr int kThreadsOfSum = 128;

template <typename Acc>
struct Energies {
  Acc* of[kMostLayers];
};

// A block for each layer.
template <typename Acc>
__global__ void __launch_bounds__(kThreadsOfSum)
    sum_energies_kernel(const double* parts, int64_t n_parts, const __grid_constant__ Energies<Acc> energies) {
  Block<double> team(reinterpret_cast<double*>(shared_memory()), 1);
  const double* own = parts + blockIdx.x * n_parts;
  double sum[1] = {0};
  for (int64_t i = team.rank; i < n_parts; i += team.size) {
    sum[0] += own[i];
  }
  team.reduce(sum, Sum{});
  if (team.rank == 0) {
    *energies.of[blockIdx.x] = static_cast<Acc>(sum[0]);
  }
}

} // namespace

template <typename Acc>
int sum_energies(const double* parts, int64_t n_parts, Acc* const* energies, int64_t n_layers, void* stream) {
  Energies<Acc> table;
  std::copy(energies, energies + n_layers, table.of);
  const Grid grid = {n_layers, kThreadsOfSum, 1, 1, Block<double>::scratch_bytes(kThreadsOfSum, 1)};
  return launch<sum_energies_kernel<Acc>>(grid, stream, parts, n_parts, table);
}

template int sum_energies(const double*, int64_t, float* const*, int64_t, void*);
template int sum_energies(const double*, int64_t, double* const*, int64_t, void*);

} // namespace lgd::gpu
