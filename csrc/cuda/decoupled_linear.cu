// decoupled_linear for small widths: a block keeps the weights of a layer in shared memory and multiplies a tile of
// samples with them; the raw logits are judged from there. A second launch adds up the energies.

#include "decoupled_linear.h"

#include <utility>

#include "linear_tiles.cuh"
#include "teams.cuh"

namespace lgd::gpu {
namespace {

template <typename K>
struct ForwardEntry {
  const typename K::Element* z;
  const typename K::Weight *weight, *bias;
  ResidualPointers<typename K::Element> io;
  ResidualNumbers<typename K::Acc> numbers;
  typename K::Acc branch_scale;
  int phi;
};

template <typename K>
struct ForwardTable {
  ForwardCut cut;
  int64_t n_samples;
  int d_in, d_out;
  int64_t stride_of_z, stride_of_weight;
  ResidualStrides strides;
  HiddenLossNumbers<typename K::Acc> hidden_loss;
  ForwardEntry<K> layers[kMostLayers];
};

// tile_energy: (layers, row tiles, panels)
template <typename K>
__global__ void __launch_bounds__(kLinearThreads, 1)
    forward_kernel(const __grid_constant__ ForwardTable<K> table, double* tile_energy) {
  using Acc = typename K::Acc;
  using Operand = typename K::Operand;
  using Multiply = typename K::Multiply;
  const ForwardCut& cut = table.cut;
  const int64_t tiles = cut.row_tiles * cut.panels, tile = blockIdx.x % tiles;
  const ForwardEntry<K>& layer = table.layers[blockIdx.x / tiles];
  const int64_t first_row = tile / cut.panels * K::kRows;
  const int first_column = static_cast<int>(tile % cut.panels) * K::kColumns;
  const int rows = at_most(table.n_samples - first_row, K::kRows);
  const int columns = at_most(table.d_out - first_column, K::kColumns);

  Pieces pieces;
  Block<double> team(pieces.take<double>(Block<double>::scratch_bytes(kLinearThreads, 1)), 1);
  Acc* const bias = pieces.take<Acc>(cut.width * sizeof(Acc));
  Operand* const weight = pieces.take<Operand>(cut.weight_bytes); // (width, d_in)
  Operand* const input = pieces.take<Operand>(cut.tile_bytes);    // (rows, d_in)
  Acc* const logits = reinterpret_cast<Acc*>(input);              // (rows, width), in its place
  const int depth = padded(table.d_in), stride_of_logits = stride_of_tile(cut.width, sizeof(Acc));
  fill<Multiply>(
      weight, cut.stride, cut.width, depth, layer.weight + first_column * table.stride_of_weight,
      table.stride_of_weight, columns, table.d_in);
  fill<Multiply, true>(
      input, cut.stride, K::kRows, depth, layer.z + first_row * table.stride_of_z, table.stride_of_z, rows, table.d_in,
      layer.phi);
  for (int i = threadIdx.x; i < cut.width; i += kLinearThreads) {
    bias[i] = layer.bias != nullptr && i < columns ? number_from<Acc>(layer.bias[first_column + i]) : Acc(0);
  }
  block_sync();
  ProductSums<Acc, kColumnsOfWarp<K>> sums(K::kRows / 16, kLinearWarps);
  const View<Operand, false> of_input{input, cut.stride}, of_weight{weight, cut.stride};
  sums.template add<Multiply>(of_input, of_weight, K::kRows, cut.width, depth);
  block_sync();
  store_sums(sums, K::kRows, cut.width, logits, stride_of_logits);
  block_sync();

  double energy[1] = {0};
  for_groups_of_tile<typename K::Element>(
      logits, stride_of_logits, rows, columns, first_row, first_column, [&](const Place& p, auto& x) {
        const ResidualGroup<typename K::Element> group(layer.io, table.strides, p);
#pragma unroll
        for (int i = 0; i < kPerVector<typename K::Element>; ++i) {
          x[i] = layer.branch_scale * x[i] + bias[p.column - first_column + i];
        }
        energy[0] += static_cast<double>(judge(x, group, layer.numbers, table.hidden_loss));
      });
  team.reduce(energy, Sum{});
  if (team.rank == 0) {
    tile_energy[blockIdx.x] = energy[0];
  }
}

template <typename Acc>
ForwardCut cut_of(const DecoupledLinearLayer& layer, bool tf32) {
  return with_kind<Acc>(layer.linear, tf32, [&]<typename K>(K) { return forward_cut(shape_of<K>(layer.linear)); });
}

template <typename K, typename Acc>
int launch_forward(
    const DecoupledLinear<Acc>& io, const std::vector<const DecoupledLinearLayer*>& layers, const ForwardCut& cut,
    double* tile_energy, void* stream) {
  using T = typename K::Element;
  using Weight = typename K::Weight;
  const DecoupledLinearLayer& like = *layers[0];
  static_assert(sizeof(ForwardTable<K>) <= kMostTableBytes);
  ForwardTable<K> table;
  table.cut = cut;
  table.n_samples = like.linear.n_samples;
  table.d_in = like.linear.d_in;
  table.d_out = like.linear.d_out;
  table.stride_of_z = like.linear.z.stride;
  table.stride_of_weight = like.linear.weight.stride;
  table.strides = strides_of(like.io);
  table.hidden_loss = numbers_of<Acc>(io.hidden_loss);
  for (size_t t = 0; t < layers.size(); ++t) {
    const LinearLayer& linear = layers[t]->linear;
    const LayerOptions& o = linear.options;
    table.layers[t] = {
        static_cast<const T*>(linear.z.data),
        static_cast<const Weight*>(linear.weight.data),
        static_cast<const Weight*>(linear.bias.data),
        pointers_of<T>(layers[t]->io, o.skip),
        numbers_of<Acc>(o, code_of(linear, false)),
        static_cast<Acc>(o.branch_scale),
        code_of(linear, true)};
  }
  const int64_t scratch = Block<double>::scratch_bytes(kLinearThreads, 1) + cut.width * sizeof(Acc);
  const Grid grid = {
      static_cast<int64_t>(layers.size()) * cut.row_tiles * cut.panels, kLinearThreads, 1, 1,
      scratch + cut.weight_bytes + cut.tile_bytes};
  return launch<forward_kernel<K>>(grid, stream, table, tile_energy);
}

} // namespace

template <typename Acc>
int64_t count_tile_energies(const DecoupledLinear<Acc>& io) {
  int64_t count = 0;
  for (int64_t t = 0; t < io.n_layers; ++t) {
    const ForwardCut cut = cut_of<Acc>(io.layers[t], io.tf32);
    count += cut.row_tiles * cut.panels;
  }
  return count;
}

template <typename Acc>
int decoupled_linear(const DecoupledLinear<Acc>& io, void* stream) {
  double* tile_energy = io.tile_energy;
  return for_launches(io.layers, io.n_layers, [&](const std::vector<const DecoupledLinearLayer*>& layers) -> int {
    const LinearLayer& like = layers[0]->linear;
    if (is_too_wide(like)) {
      return kInvalidValue;
    }
    const int64_t count = layers.size();
    const ForwardCut cut = cut_of<Acc>(*layers[0], io.tf32);
    const int64_t tiles = cut.row_tiles * cut.panels;
    if (tiles > 0) {
      const int error = with_kind<Acc>(
          like, io.tf32, [&]<typename K>(K) { return launch_forward<K>(io, layers, cut, tile_energy, stream); });
      if (error != 0) {
        return error;
      }
    }
    Acc* energies[kMostLayers];
    for (int64_t t = 0; t < count; ++t) {
      energies[t] = io.energy + (layers[t] - io.layers);
    }
    const double* own = std::exchange(tile_energy, tile_energy + count * tiles);
    return sum_energies(own, tiles, energies, count, stream);
  });
}

#define LGD_INSTANTIATE(Acc)                                         \
  template int64_t count_tile_energies(const DecoupledLinear<Acc>&); \
  template int decoupled_linear(const DecoupledLinear<Acc>&, void*);

LGD_INSTANTIATE(float)
LGD_INSTANTIATE(double)

#undef LGD_INSTANTIATE

} // namespace lgd::gpu
