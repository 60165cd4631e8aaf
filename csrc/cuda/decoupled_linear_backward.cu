// decoupled_linear_backward for small widths: delta W becomes the gradient of z, delta^T phi(z) and the sums of delta
// are those of the weight and the bias. z and delta are read once for all three. A block has a chunk of the samples of
// a layer, in order; where a layer has several, a second launch adds up their parts.

#include <utility>

#include "decoupled_linear.h"
#include "linear_tiles.cuh"

namespace lgd::gpu {
namespace {

template <typename K>
struct BackwardEntry {
  using Acc = typename K::Acc;
  const typename K::Element *z, *delta, *q; // q: null where there is no skip
  const typename K::Weight* weight;
  const Acc* upstream;
  typename K::Element* grad_z;
  typename K::Weight *grad_weight, *grad_bias;
  Acc skip, branch_scale;
  int phi;
};

template <typename K>
struct BackwardTable {
  BackwardCut cut;
  int64_t n_samples;
  int d_in, d_out;
  int64_t stride_of_z, stride_of_weight, stride_of_delta, stride_of_q, stride_of_grad_z;
  typename K::Acc*
      parts; // (layers, chunks, d_out, d_in + 1): of the weight's gradient, and in the last column the bias's
  BackwardEntry<K> layers[kMostLayers];
};

// An element of the gradient of the weight or, where `column` is d_in, of the bias.
template <typename Entry, typename Acc>
LGD_DEVICE void store_gradient(const Entry& layer, int d_in, int row, int column, Acc upstream, Acc sum) {
  using Weight = std::remove_pointer_t<decltype(layer.grad_weight)>;
  if (column == d_in) {
    layer.grad_bias[row] = element_from<Weight>(upstream * sum);
  } else {
    layer.grad_weight[row * d_in + column] = element_from<Weight>(layer.branch_scale * upstream * sum);
  }
}

// What a block works on.
template <typename K>
struct Panel {
  const BackwardTable<K>& table;
  int64_t part; // of its layer's chunk, counted over all layers
  const BackwardEntry<K>& layer;
  int64_t chunk;
  int number, first_column, columns;
  typename K::Acc upstream;

  LGD_DEVICE explicit Panel(const BackwardTable<K>& table)
      : table(table),
        part(blockIdx.x / table.cut.panels),
        layer(table.layers[part / table.cut.chunks]),
        chunk(part % table.cut.chunks),
        number(static_cast<int>(blockIdx.x % table.cut.panels)),
        first_column(number * K::kColumns),
        columns(at_most(table.d_in - first_column, K::kColumns)),
        upstream(layer.upstream == nullptr ? typename K::Acc(1) : *layer.upstream) {}

  // Stores a sum over the samples of the chunk: where it is the only one, in the gradient.
  LGD_DEVICE void store_part(int row, int column, typename K::Acc sum) const {
    if (table.cut.chunks > 1) {
      table.parts[(part * table.d_out + row) * (table.d_in + 1) + column] = sum;
    } else {
      store_gradient(layer, table.d_in, row, column, upstream, sum);
    }
  }
};

// The gradient of z for a tile of products delta W.
template <typename K, typename Acc>
LGD_DEVICE void carry_to_input(const Panel<K>& panel, const Acc* products, int stride, int rows, int64_t first_row) {
  using T = typename K::Element;
  const BackwardTable<K>& table = panel.table;
  const BackwardEntry<K>& layer = panel.layer;
  for_groups_of_tile<T>(
      products, stride, rows, panel.columns, first_row, panel.first_column, [&](const Place& p, auto& x) {
        constexpr int W = kPerVector<T>;
        Acc given[W], value[W], slope[W];
        const Words<4> q = load_group(shifted(layer.q, table.stride_of_q, p), p.count);
        unpack<T>(load_group(layer.phi == 0 ? nullptr : shifted(layer.z, table.stride_of_z, p), p.count), given);
        activate(layer.phi, given, value, slope);
        unpack<T>(q, given);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          x[i] = layer.branch_scale * panel.upstream * x[i] * slope[i];
          x[i] = layer.q == nullptr ? x[i] : x[i] - layer.skip * panel.upstream * given[i];
        }
        store_group(shifted(layer.grad_z, table.stride_of_grad_z, p), p.count, x);
      });
}

template <typename K>
__global__ void __launch_bounds__(kLinearThreads, 1) backward_kernel(const __grid_constant__ BackwardTable<K> table) {
  using Acc = typename K::Acc;
  using Operand = typename K::Operand;
  using Multiply = typename K::Multiply;
  const BackwardCut& cut = table.cut;
  const Panel<K> panel(table);
  const BackwardEntry<K>& layer = panel.layer;
  const bool need_z = layer.grad_z != nullptr, need_weight = layer.grad_weight != nullptr;
  const int thread = threadIdx.x, n_outputs = padded(table.d_out),
            stride_of_products = stride_of_tile(cut.width, sizeof(Acc));

  Pieces pieces;
  Operand* const weight = pieces.take<Operand>(cut.weight_bytes);   // (d_out, width)
  Operand* const delta = pieces.take<Operand>(cut.tile_bytes);      // (rows, d_out)
  Operand* const input = delta + cut.delta_bytes / sizeof(Operand); // (rows, width)
  Acc* const products = reinterpret_cast<Acc*>(delta);              // (rows, width), in the place of both
  if (need_z) {
    fill<Multiply>(
        weight, cut.stride, n_outputs, cut.width, layer.weight + panel.first_column, table.stride_of_weight,
        table.d_out, panel.columns);
  }
  const int row_blocks = n_outputs <= 16 ? 1 : n_outputs <= 32 ? 2 : n_outputs <= 64 ? 4 : 8;
  ProductSums<Acc, K::kColumns / 8> of_weight(row_blocks, kLinearWarps);
  Total<Acc> of_bias;
  const int64_t first_tile = panel.chunk * cut.tiles_of_chunk;
  for (int64_t tile = first_tile; tile < first_tile + cut.tiles_of_chunk && tile < cut.row_tiles; ++tile) {
    const int64_t first_row = tile * K::kRows;
    const int rows = at_most(table.n_samples - first_row, K::kRows);
    const typename K::Element* deltas = layer.delta + first_row * table.stride_of_delta;
    fill<Multiply>(delta, cut.stride_of_delta, K::kRows, n_outputs, deltas, table.stride_of_delta, rows, table.d_out);
    if (need_weight) {
      fill<Multiply, true>(
          input, cut.stride, K::kRows, cut.width, layer.z + first_row * table.stride_of_z + panel.first_column,
          table.stride_of_z, rows, panel.columns, layer.phi);
    }
    if (layer.grad_bias != nullptr && panel.number == 0 && thread < table.d_out) { // of what is not rounded
      for (int i = 0; i < rows; ++i) {
        of_bias.add(number_from<Acc>(deltas[i * table.stride_of_delta + thread]));
      }
    }
    block_sync();
    if (need_weight) {
      const View<Operand, true> of_delta{delta, cut.stride_of_delta}, of_input{input, cut.stride};
      of_weight.template add<Multiply>(of_delta, of_input, n_outputs, cut.width, K::kRows);
    }
    if (need_z) {
      const View<Operand, false> of_delta{delta, cut.stride_of_delta};
      const View<Operand, true> weights{weight, cut.stride};
      ProductSums<Acc, kColumnsOfWarp<K>> sums(K::kRows / 16, kLinearWarps);
      sums.template add<Multiply>(of_delta, weights, K::kRows, cut.width, n_outputs);
      block_sync();
      store_sums(sums, K::kRows, cut.width, products, stride_of_products);
      block_sync();
      carry_to_input(panel, products, stride_of_products, rows, first_row);
    }
    block_sync();
  }
  if (need_weight) {
    of_weight.for_pairs(n_outputs, cut.width, [&](int row, int column, Acc left, Acc right) {
      if (row < table.d_out && column < panel.columns) {
        panel.store_part(row, panel.first_column + column, left);
      }
      if (row < table.d_out && column + 1 < panel.columns) {
        panel.store_part(row, panel.first_column + column + 1, right);
      }
    });
  }
  if (layer.grad_bias != nullptr && panel.number == 0 && thread < table.d_out) {
    panel.store_part(thread, table.d_in, of_bias.value());
  }
}

// The gradients from the parts of all chunks, in order. A block has kLinearThreads elements of a layer.
template <typename K>
__global__ void __launch_bounds__(kLinearThreads, 1) sum_parts_kernel(const __grid_constant__ BackwardTable<K> table) {
  using Acc = typename K::Acc;
  const int columns = table.d_in + 1, size = table.d_out * columns;
  const int blocks = static_cast<int>(tiles_of(size, kLinearThreads));
  const int64_t layer_number = blockIdx.x / blocks;
  const int element = static_cast<int>(blockIdx.x % blocks) * kLinearThreads + static_cast<int>(threadIdx.x);
  const BackwardEntry<K>& layer = table.layers[layer_number];
  const int row = element / columns, column = element % columns;
  const bool wanted = column == table.d_in ? layer.grad_bias != nullptr : layer.grad_weight != nullptr;
  if (element >= size || !wanted) {
    return;
  }
  const Acc* parts = table.parts + layer_number * table.cut.chunks * size + element;
  Total<Acc> sum;
  for (int64_t chunk = 0; chunk < table.cut.chunks; ++chunk) {
    sum.add(parts[chunk * size]);
  }
  store_gradient(layer, table.d_in, row, column, layer.upstream == nullptr ? Acc(1) : *layer.upstream, sum.value());
}

template <typename Acc>
BackwardCut cut_of(const DecoupledLinearBackwardLayer<Acc>& layer, bool tf32) {
  return with_kind<Acc>(layer.linear, tf32, [&]<typename K>(K) {
    return backward_cut(shape_of<K>(layer.linear), layer.grad_weight.data != nullptr);
  });
}

// What a layer needs of the working space of a call backward.
template <typename Acc>
int64_t parts_of(const DecoupledLinearBackwardLayer<Acc>& layer, const BackwardCut& cut) {
  return cut.chunks > 1 ? cut.chunks * layer.linear.d_out * (layer.linear.d_in + 1) : 0;
}

template <typename K, typename Acc>
int launch_backward(
    const std::vector<const DecoupledLinearBackwardLayer<Acc>*>& layers, const BackwardCut& cut, Acc* parts,
    void* stream) {
  using T = typename K::Element;
  using Weight = typename K::Weight;
  const DecoupledLinearBackwardLayer<Acc>& like = *layers[0];
  static_assert(sizeof(BackwardTable<K>) <= kMostTableBytes);
  BackwardTable<K> table;
  table.cut = cut;
  table.n_samples = like.linear.n_samples;
  table.d_in = like.linear.d_in;
  table.d_out = like.linear.d_out;
  table.stride_of_z = like.linear.z.stride;
  table.stride_of_weight = like.linear.weight.stride;
  table.stride_of_delta = like.delta.stride;
  table.stride_of_q = like.q.stride;
  table.stride_of_grad_z = like.grad_z.stride;
  table.parts = parts;
  for (size_t t = 0; t < layers.size(); ++t) {
    const DecoupledLinearBackwardLayer<Acc>& layer = *layers[t];
    const LayerOptions& o = layer.linear.options;
    table.layers[t] = {
        static_cast<const T*>(layer.linear.z.data),
        static_cast<const T*>(layer.delta.data),
        static_cast<const T*>(o.skip == 0 ? nullptr : layer.q.data),
        static_cast<const Weight*>(layer.linear.weight.data),
        layer.upstream,
        static_cast<T*>(layer.grad_z.data),
        static_cast<Weight*>(layer.grad_weight.data),
        static_cast<Weight*>(layer.grad_bias.data),
        static_cast<Acc>(o.skip),
        static_cast<Acc>(o.branch_scale),
        code_of(layer.linear, true)};
  }
  const int64_t count = layers.size();
  const Grid grid = {count * cut.chunks * cut.panels, kLinearThreads, 1, 1, cut.weight_bytes + cut.tile_bytes};
  const int error = launch<backward_kernel<K>>(grid, stream, table);
  const int64_t blocks = tiles_of(static_cast<int64_t>(table.d_out) * (table.d_in + 1), kLinearThreads);
  if (error != 0 || cut.chunks == 1 || blocks == 0) {
    return error;
  }
  return launch<sum_parts_kernel<K>>({count * blocks, kLinearThreads}, stream, table);
}

} // namespace

template <typename Acc>
int64_t count_parts(const DecoupledLinearBackward<Acc>& io) {
  int64_t count = 0;
  for (int64_t t = 0; t < io.n_layers; ++t) {
    count += parts_of(io.layers[t], cut_of(io.layers[t], io.tf32));
  }
  return count;
}

template <typename Acc>
int decoupled_linear_backward(const DecoupledLinearBackward<Acc>& io, void* stream) {
  using Layer = DecoupledLinearBackwardLayer<Acc>;
  Acc* parts = io.parts;
  return for_launches(io.layers, io.n_layers, [&](const std::vector<const Layer*>& layers) -> int {
    const Layer& like = *layers[0];
    if (is_too_wide(like.linear)) {
      return kInvalidValue;
    }
    const BackwardCut cut = cut_of(like, io.tf32);
    Acc* own = std::exchange(parts, parts + static_cast<int64_t>(layers.size()) * parts_of(like, cut));
    return with_kind<Acc>(
        like.linear, io.tf32, [&]<typename K>(K) { return launch_backward<K>(layers, cut, own, stream); });
  });
}

#define LGD_INSTANTIATE(Acc)                                         \
  template int64_t count_parts(const DecoupledLinearBackward<Acc>&); \
  template int decoupled_linear_backward(const DecoupledLinearBackward<Acc>&, void*);

LGD_INSTANTIATE(float)
LGD_INSTANTIATE(double)

#undef LGD_INSTANTIATE

} // namespace lgd::gpu
