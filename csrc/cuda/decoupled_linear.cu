// decoupled_linear for small widths: a block keeps the weights of a layer in shared memory, multiplies tiles of samples
// with them, and does everything else from there.
//
//   forward_kernel    phi(z) W^T: raw logits, their residual, and its energy
//   backward_kernel   delta W, which becomes the gradient of z, and delta^T phi(z) and the sums of delta, which are
//   those
//                     of the weight and the bias; z and delta are read once for all three

#include "decoupled_linear.h"

#include <utility>
#include <vector>

#include "layers.h"
#include "products.cuh"
#include "residual.cuh"
#include "teams.cuh"

namespace lgd::gpu {
namespace {

// What tensors are made of and how they are multiplied.
template <typename Element_, typename Weight_, typename Multiply_>
struct Kind {
  using Element = Element_; // of z, and of all that is like it
  using Weight = Weight_;
  using Multiply = Multiply_;
  using Operand = typename Multiply::Element;
  using Acc = Accumulated<Element>;
  static constexpr int kRows = rows_of_tile(sizeof(Operand)), kColumns = columns_of_tile(sizeof(Operand));
};

LGD_DEVICE int at_most(int64_t x, int limit) {
  return x < limit ? static_cast<int>(x) : limit;
}

// Shared memory, piece by piece; every piece begins at a multiple of 16 bytes.
class Pieces {
 public:
  template <typename A>
  LGD_DEVICE A* take(int64_t bytes) {
    A* piece = reinterpret_cast<A*>(next_);
    next_ += (bytes + 15) / 16 * 16;
    return piece;
  }

 private:
  char* next_ = shared_memory();
};

// tile (rows, columns) = the source as operands of a product, or phi of it; zeros beyond what there is of the source.
template <typename Multiply, bool has_phi = false, typename T>
LGD_DEVICE void fill(
    typename Multiply::Element* tile, int stride, int rows, int columns, const T* source, int64_t source_stride,
    int source_rows, int source_columns, int phi = 0) {
  constexpr int W = kPerVector<T>, in_flight = 4;
  using Operand = typename Multiply::Element;
  const int groups_of_row = columns / W, groups = rows * groups_of_row, threads = blockDim.x;
  const auto place = [&](int group) {
    const int row = group / groups_of_row, column = group % groups_of_row * W;
    const int left = row < source_rows ? source_columns - column : 0;
    return Place{row, column, left < 0 ? 0 : at_most(left, W)};
  };
  for (int first = threadIdx.x; first < groups; first += in_flight * threads) {
    Words<4> words[in_flight];
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      if (first + i * threads < groups) {
        const Place p = place(first + i * threads);
        words[i] = load_group(p.count == 0 ? nullptr : source + p.row * source_stride + p.column, p.count);
      }
    }
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      if (first + i * threads < groups) {
        const Place p = place(first + i * threads);
        Accumulated<T> x[W], slope[W];
        unpack<T>(words[i], x);
        if constexpr (has_phi) {
          activate(phi, x, x, slope);
        }
#pragma unroll
        for (int j = 0; j < W; ++j) {
          x[j] = j < p.count ? Multiply::rounded(x[j]) : Accumulated<T>(0);
        }
        store(tile + p.row * stride + p.column, pack<Operand>(x));
      }
    }
  }
}

// f(place in the matrix, the Acc of its group in the tile) for the groups of a tile (rows, columns) of a matrix, whose
// first element is at (first_row, first_column) there.
template <typename T, typename Acc, typename F>
LGD_DEVICE void for_groups_of_tile(
    const Acc* tile, int stride, int rows, int columns, int64_t first_row, int first_column, const F& f) {
  constexpr int W = kPerVector<T>;
  const int groups_of_row = (columns + W - 1) / W;
  for (int i = threadIdx.x; i < rows * groups_of_row; i += blockDim.x) {
    const int row = i / groups_of_row, column = i % groups_of_row * W;
    Acc x[W];
    unpack<Acc>(load<kWords<Acc, W>>(tile + row * stride + column), x);
    f(Place{first_row + row, first_column + column, at_most(columns - column, W)}, x);
  }
}

template <int N, typename Acc>
LGD_DEVICE void store_sums(const ProductSums<Acc, N>& sums, int rows, int columns, Acc* tile, int stride) {
  sums.for_pairs(rows, columns, [&](int row, int column, Acc left, Acc right) {
    tile[row * stride + column] = left;
    tile[row * stride + column + 1] = right;
  });
}

// How many 8 columns a warp has of the product of a tile of samples with a panel.
template <typename K>
constexpr int kColumnsOfWarp = K::kColumns / 8 / (kLinearWarps / (K::kRows / 16));

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

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

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

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

// ---------------------------------------------------------------------------------------------------------------------
// Launches
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kInvalidValue = 1; // cudaErrorInvalidValue

// f(Kind{}) for a layer.
template <typename Acc, typename F>
auto with_kind(const LinearLayer& layer, bool tf32, const F& f) {
  if constexpr (std::is_same_v<Acc, double>) {
    return f(Kind<double, double, Exact<double>>{});
  } else {
    const bool wide = layer.z.dtype == DType::Float32;
    switch (layer.weight.dtype) {
      case DType::BFloat16:
        return wide ? f(Kind<float, BFloat16, Halves<BFloat16>>{}) : f(Kind<BFloat16, BFloat16, Halves<BFloat16>>{});
      case DType::Float16:
        return wide ? f(Kind<float, Float16, Halves<Float16>>{}) : f(Kind<Float16, Float16, Halves<Float16>>{});
      default:
        return tf32 ? f(Kind<float, float, Tf32>{}) : f(Kind<float, float, Exact<float>>{});
    }
  }
}

bool alike(const Matrix& a, const Matrix& b) {
  return a.dtype == b.dtype && a.stride == b.stride && (a.data == nullptr) == (b.data == nullptr);
}
bool alike(const LinearLayer& a, const LinearLayer& b) {
  return a.n_samples == b.n_samples && a.d_in == b.d_in && a.d_out == b.d_out && alike(a.z, b.z) &&
         alike(a.weight, b.weight);
}
bool alike(const DecoupledLinearLayer& a, const DecoupledLinearLayer& b) {
  return alike(a.linear, b.linear) && alike(a.io.target, b.io.target) && alike(a.io.multiplier, b.io.multiplier) &&
         alike(a.io.residual, b.io.residual) && alike(a.io.delta, b.io.delta) && alike(a.io.q, b.io.q);
}
template <typename Acc>
bool alike(const DecoupledLinearBackwardLayer<Acc>& a, const DecoupledLinearBackwardLayer<Acc>& b) {
  return alike(a.linear, b.linear) && alike(a.delta, b.delta) && alike(a.q, b.q) && alike(a.grad_z, b.grad_z) &&
         alike(a.grad_weight, b.grad_weight);
}

// f(layers) for those of every launch, up to kMostLayers that are alike, as long as it returns 0.
template <typename Layer, typename F>
int for_launches(const Layer* layers, int64_t n_layers, const F& f) {
  std::vector<bool> taken(n_layers);
  for (int64_t first = 0; first < n_layers; ++first) {
    std::vector<const Layer*> chosen;
    for (int64_t t = first; t < n_layers && chosen.size() < kMostLayers; ++t) {
      if (!taken[t] && alike(layers[first], layers[t])) {
        taken[t] = true;
        chosen.push_back(layers + t);
      }
    }
    if (const int error = chosen.empty() ? 0 : f(chosen)) {
      return error;
    }
  }
  return 0;
}

// phi's code, or f's; the other one is the identity.
int code_of(const LinearLayer& layer, bool of_phi) {
  return layer.preactivation == of_phi ? static_cast<int>(layer.options.activation) : 0;
}

template <typename K>
LinearShape shape_of(const LinearLayer& layer) {
  return {layer.n_samples, layer.d_in, layer.d_out, sizeof(typename K::Operand), sizeof(typename K::Acc)};
}

template <typename Acc>
ForwardCut cut_of(const DecoupledLinearLayer& layer, bool tf32) {
  return with_kind<Acc>(layer.linear, tf32, [&]<typename K>(K) { return forward_cut(shape_of<K>(layer.linear)); });
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

bool is_too_wide(const LinearLayer& layer) {
  return layer.d_in > kMostWidth || layer.d_out > kMostWidth;
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
  template int64_t count_tile_energies(const DecoupledLinear<Acc>&); \
  template int decoupled_linear(const DecoupledLinear<Acc>&, void*); \
  template int64_t count_parts(const DecoupledLinearBackward<Acc>&); \
  template int decoupled_linear_backward(const DecoupledLinearBackward<Acc>&, void*);

LGD_INSTANTIATE(float)
LGD_INSTANTIATE(double)

#undef LGD_INSTANTIATE

} // namespace lgd::gpu
