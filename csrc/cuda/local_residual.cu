// local_residual: one pass over the elements of all layers, and a second launch that adds up their energies.

#include "local_residual.h"

#include "layers.h"
#include "residual.cuh"
#include "teams.cuh"

namespace lgd::gpu {
namespace {

template <typename T>
struct ResidualEntry {
  const T* logits;
  ResidualPointers<T> pointers;
  ResidualNumbers<Accumulated<T>> numbers;
};

template <typename T>
struct ResidualTable {
  ResidualCut cut;
  int64_t stride_of_logits;
  ResidualStrides strides;
  HiddenLossNumbers<Accumulated<T>> hidden_loss;
  ResidualEntry<T> layers[kMostLayers];
};

// tile_energy: (layers, blocks). At least three blocks on a multiprocessor hide how long loads take; in float64 the
// registers are for one.
template <typename T>
__global__ void __launch_bounds__(kResidualThreads, sizeof(T) == 8 ? 1 : 3)
    local_residual_kernel(const __grid_constant__ ResidualTable<T> table, double* tile_energy) {
  using Acc = Accumulated<T>;
  constexpr int W = kPerVector<T>;
  const ResidualCut& cut = table.cut;
  const int64_t layer = blockIdx.x / cut.blocks, block = blockIdx.x % cut.blocks;
  const ResidualEntry<T>& entry = table.layers[layer];
  Block<double> team(reinterpret_cast<double*>(shared_memory()), 1);
  double energy[1] = {0};
#pragma unroll
  for (int i = 0; i < kGroupsOfThread; ++i) {
    const int64_t number = (block * kGroupsOfThread + i) * kResidualThreads + team.rank;
    if (number < cut.rows * cut.groups_of_row) {
      const Place p = place_of<W>(number, cut.groups_of_row, cut.columns);
      const Words<4> words = load_group(shifted(entry.logits, table.stride_of_logits, p), p.count);
      const ResidualGroup<T> group(entry.pointers, table.strides, p);
      Acc logits[W];
      unpack<T>(words, logits);
      energy[0] += static_cast<double>(judge(logits, group, entry.numbers, table.hidden_loss));
    }
  }
  team.reduce(energy, Sum{});
  if (team.rank == 0) {
    tile_energy[blockIdx.x] = energy[0];
  }
}

// Whether every row of a layer begins where the one before it ends.
bool is_packed(const ResidualLayer& layer) {
  const ResidualIo& io = layer.io;
  for (const Matrix* x : {&layer.logits, &io.target, &io.multiplier, &io.skip_input, &io.residual, &io.delta, &io.q}) {
    if (x->data != nullptr && x->stride != layer.n_units && layer.n_samples > 1) {
      return false;
    }
  }
  return true;
}

template <typename Acc>
ResidualCut cut_of(const LocalResidual<Acc>& io) {
  if (io.n_layers == 0) {
    return {};
  }
  const ResidualLayer& layer = io.layers[0];
  return residual_cut(layer.n_samples, layer.n_units, is_packed(layer), element_size(layer.logits.dtype));
}

// Layers first .. first + count - 1.
template <typename T, typename Acc>
int run(const LocalResidual<Acc>& io, const ResidualCut& cut, int64_t first, int64_t count, void* stream) {
  const ResidualLayer* layers = io.layers + first;
  static_assert(sizeof(ResidualTable<T>) <= kMostTableBytes);
  ResidualTable<T> table;
  table.cut = cut;
  table.stride_of_logits = layers[0].logits.stride;
  table.strides = strides_of(layers[0].io);
  table.hidden_loss = numbers_of<Acc>(io.hidden_loss);
  for (int64_t t = 0; t < count; ++t) {
    const LayerOptions& o = layers[t].options;
    table.layers[t] = {
        static_cast<const T*>(layers[t].logits.data), pointers_of<T>(layers[t].io, o.skip),
        numbers_of<Acc>(o, o.activation)};
  }
  const Grid grid = {count * cut.blocks, kResidualThreads, 1, 1, Block<double>::scratch_bytes(kResidualThreads, 1)};
  return launch<local_residual_kernel<T>>(grid, stream, table, io.tile_energy + first * cut.blocks);
}

} // namespace

template <typename Acc>
int64_t count_tile_energies(const LocalResidual<Acc>& io) {
  return io.n_layers * cut_of(io).blocks;
}

template <typename Acc>
int local_residual(const LocalResidual<Acc>& io, void* stream) {
  const ResidualCut cut = cut_of(io);
  for (int64_t first = 0; first < io.n_layers; first += kMostLayers) {
    const int64_t count = layers_of_launch(io.n_layers, first);
    if (cut.blocks > 0) {
      const int error = with_element<Acc>(io.layers[0].logits.dtype, [&](auto element) {
        return run<decltype(element)>(io, cut, first, count, stream);
      });
      if (error != 0) {
        return error;
      }
    }
    Acc* energies[kMostLayers];
    for (int64_t t = 0; t < count; ++t) {
      energies[t] = io.energy + first + t;
    }
    if (const int error = sum_energies(io.tile_energy + first * cut.blocks, cut.blocks, energies, count, stream)) {
      return error;
    }
  }
  return 0;
}

#define LGD_INSTANTIATE(Acc)                                       \
  template int64_t count_tile_energies(const LocalResidual<Acc>&); \
  template int local_residual(const LocalResidual<Acc>&, void*);

LGD_INSTANTIATE(float)
LGD_INSTANTIATE(double)

#undef LGD_INSTANTIATE

} // namespace lgd::gpu
