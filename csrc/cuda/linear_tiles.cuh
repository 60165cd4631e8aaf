// What the kernels of decoupled_linear share: tiles in shared memory, and how layers are put together for a launch.
#pragma once

#include <vector>

#include "decoupled_linear.h"
#include "layers.h"
#include "products.cuh"
#include "residual.cuh"

namespace lgd::gpu {

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

inline bool alike(const Matrix& a, const Matrix& b) {
  return a.dtype == b.dtype && a.stride == b.stride && (a.data == nullptr) == (b.data == nullptr);
}
inline bool alike(const LinearLayer& a, const LinearLayer& b) {
  return a.n_samples == b.n_samples && a.d_in == b.d_in && a.d_out == b.d_out && alike(a.z, b.z) &&
         alike(a.weight, b.weight);
}
inline bool alike(const DecoupledLinearLayer& a, const DecoupledLinearLayer& b) {
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
inline int code_of(const LinearLayer& layer, bool of_phi) {
  return layer.preactivation == of_phi ? static_cast<int>(layer.options.activation) : 0;
}

template <typename K>
LinearShape shape_of(const LinearLayer& layer) {
  return {layer.n_samples, layer.d_in, layer.d_out, sizeof(typename K::Operand), sizeof(typename K::Acc)};
}

inline bool is_too_wide(const LinearLayer& layer) {
  return layer.d_in > kMostWidth || layer.d_out > kMostWidth;
}

} // namespace lgd::gpu
