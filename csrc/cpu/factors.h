// The factors of the products of linear layers as the multiplier takes them: in the accumulation type, where they are
// or transposed; or in bfloat16, whose second factor has its rows in interleaved pairs.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "gemm.h"
#include "layers.h"
#include "parallel.h"
#include "rows.h"
#include "tiles.h"
#include "transpose.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

using Narrow = c10::BFloat16;

inline bool is_narrow(const Matrix& matrix) {
  return matrix.dtype == DType::BFloat16;
}

inline int64_t even(int64_t count) {
  return (count + 1) / 2 * 2;
}

// The matrix without its first rows.
inline Matrix rows_from(const Matrix& matrix, int64_t row) {
  return {row_of(matrix, row).data, matrix.dtype, matrix.stride};
}

// A second factor without its first columns.
inline Matrix columns_from(const Matrix& factor, int64_t column) {
  const int64_t pair = is_narrow(factor) ? 2 : 1;
  return {element(row_of(factor, 0), pair * column), factor.dtype, factor.stride};
}

// C (m, n) = A B, or C += A B, for A (m, k) and a second factor B (k, n); k may be 0, and is even in bfloat16.
template <typename Acc>
inline void multiply(
    int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, Acc* c, int64_t c_stride, bool accumulate) {
  if (k == 0) {
    for (int64_t i = 0; i < m * n && !accumulate; ++i) {
      c[i / n * c_stride + i % n] = 0;
    }
    return;
  }
  const auto product_of = [&](auto element) {
    using T = decltype(element);
    multiply_tile(m, n, k, row_pointer<T>(a, 0), a.stride, row_pointer<T>(b, 0), b.stride, c, c_stride, accumulate);
  };
  if constexpr (std::is_same_v<Acc, float>) {
    if (is_narrow(b)) {
      return product_of(Narrow(0, Narrow::from_bits()));
    }
  }
  product_of(Acc(0));
}

// ---------------------------------------------------------------------------------------------------------------------
// bfloat16
// ---------------------------------------------------------------------------------------------------------------------

// Two vectors of 16-bit elements and their shuffles.
struct Interleave {
  static constexpr int V = 32;
  typedef uint16_t Lanes __attribute__((vector_size(2 * V)));

  static inline Lanes load(const Narrow* source) {
    Lanes lanes;
    std::memcpy(&lanes, source, sizeof(lanes));
    return lanes;
  }
  static inline void store(Lanes lanes, Narrow* target) { std::memcpy(target, &lanes, sizeof(lanes)); }

  // a0 b0 a1 b1 ... of the lower (part 0) or upper half of a and b.
  template <int part>
  static inline Lanes woven(Lanes a, Lanes b) {
    return [&]<int... i>(std::integer_sequence<int, i...>) {
      return __builtin_shufflevector(a, b, (part * V / 2 + i / 2 + i % 2 * V)...);
    }(std::make_integer_sequence<int, V>{});
  }

  // Every second element of a, then of b, from element `part` on.
  template <int part>
  static inline Lanes parted(Lanes a, Lanes b) {
    return [&]<int... i>(std::integer_sequence<int, i...>) {
      return __builtin_shufflevector(a, b, (2 * i + part)...);
    }(std::make_integer_sequence<int, V>{});
  }
};

// pairs = even[0] odd[0] even[1] odd[1] ...
inline void weave(const Narrow* even, const Narrow* odd, int64_t count, Narrow* pairs) {
  constexpr int64_t V = Interleave::V;
  int64_t i = 0;
  for (; i + V <= count; i += V) {
    const auto a = Interleave::load(even + i), b = Interleave::load(odd + i);
    Interleave::store(Interleave::woven<0>(a, b), pairs + 2 * i);
    Interleave::store(Interleave::woven<1>(a, b), pairs + 2 * i + V);
  }
  for (; i < count; ++i) {
    pairs[2 * i] = even[i];
    pairs[2 * i + 1] = odd[i];
  }
}

// The inverse.
inline void unweave(const Narrow* pairs, int64_t count, Narrow* even, Narrow* odd) {
  constexpr int64_t V = Interleave::V;
  int64_t i = 0;
  for (; i + V <= count; i += V) {
    const auto a = Interleave::load(pairs + 2 * i), b = Interleave::load(pairs + 2 * i + V);
    Interleave::store(Interleave::parted<0>(a, b), even + i);
    Interleave::store(Interleave::parted<1>(a, b), odd + i);
  }
  for (; i < count; ++i) {
    even[i] = pairs[2 * i];
    odd[i] = pairs[2 * i + 1];
  }
}

// A tile of a float32 or bfloat16 matrix in bfloat16, with an even stride: in place, or in a buffer.
inline TileView<const Narrow> narrow_tile(const Matrix& matrix, const Tile& tile, Scratch slot) {
  if (is_narrow(matrix) && matrix.stride % 2 == 0) {
    return {row_pointer<Narrow>(matrix, tile.row) + tile.column, matrix.stride};
  }
  const int64_t stride = even(tile.columns);
  Narrow* buffer = scratch_of<Narrow>(slot, tile.rows * stride);
  for (int64_t i = 0; i < tile.rows; ++i) {
    const char* source = element(row_of(matrix, tile.row + i), tile.column);
    if (!is_narrow(matrix)) {
      store_elements(reinterpret_cast<const float*>(source), tile.columns, buffer + i * stride, 1);
    } else if (tile.columns > 0) { // nothing may lie at a null pointer, from which memcpy copies not even nothing
      std::memcpy(buffer + i * stride, source, tile.columns * sizeof(Narrow));
    }
  }
  return {buffer, stride};
}

// Transposes pairs of neighbours, which stay together: target[c / 2 * target_stride + r] are elements c and c + 1 of
// row r. The columns are even in number.
inline void transpose_pairs(
    const TileView<const Narrow>& source, int64_t rows, int64_t columns, Narrow* target, int64_t target_stride) {
  const auto pairs = [](auto* pointer) { return reinterpret_cast<const float*>(pointer); };
  transpose_matrix(
      pairs(source.data), source.stride / 2, rows, columns / 2, const_cast<float*>(pairs(target)), target_stride);
}

template <typename Acc>
inline Acc sum_of_run(const Acc* values, int64_t count) {
  using Vec = Vectorized<Acc>;
  Vec total(Acc(0));
  for_vectors<Acc>(count, [&](int64_t i, int64_t n) { total = total + Vec::loadu(values + i, n); }); // 0 beyond the end
  return sum_of_lanes(total);
}

inline float sum_of_run(const Narrow* values, int64_t count) {
  constexpr int64_t V = Vectorized<Narrow>::size();
  Vectorized<float> total(0.0f);
  for (int64_t i = 0; i < count; i += V) {
    const auto [low, high] = to_float(Vectorized<Narrow>::loadu(values + i, at_most(count - i, V)));
    total = total + (low + high);
  }
  return sum_of_lanes(total);
}

// ---------------------------------------------------------------------------------------------------------------------
// Factors
// ---------------------------------------------------------------------------------------------------------------------

// The tile as it is, as a first factor: (tile.rows, tile.columns).
template <typename Acc>
inline Matrix first_factor(const Matrix& matrix, const Tile& tile, bool narrow) {
  if (narrow) {
    return {element(row_of(matrix, tile.row), tile.column), matrix.dtype, matrix.stride};
  }
  const auto view = read_tile<Acc>(matrix, tile, Scratch::Delta);
  return {const_cast<Acc*>(view.data), dtype_of<Acc>(), view.stride};
}

// The transpose of the tile as a first factor: (tile.columns, tile.rows), in bfloat16 with an even number of columns;
// an odd one is followed by one of zeros. Adds the sums of its rows to `sums`.
template <typename Acc>
inline Matrix transposed_first_factor(const Matrix& matrix, const Tile& tile, bool narrow, Acc* sums) {
  const auto add_sums = [&](const auto* rows, int64_t stride) {
    for (int64_t i = 0; i < tile.columns; ++i) {
      sums[i] += sum_of_run(rows + i * stride, tile.rows);
    }
  };
  if (!narrow) {
    const auto view = read_tile<Acc>(matrix, tile, Scratch::Q);
    Acc* transpose = scratch_of<Acc>(Scratch::Delta, tile.columns * tile.rows); // (columns, rows)
    transpose_matrix(view.data, view.stride, tile.rows, tile.columns, transpose, tile.rows);
    add_sums(transpose, tile.rows);
    return {transpose, dtype_of<Acc>(), tile.rows};
  }
  const int64_t stride = even(tile.rows);
  Narrow* pairs = scratch_of<Narrow>(Scratch::Logits, tile.columns * stride);    // (columns / 2, stride, 2)
  Narrow* transpose = scratch_of<Narrow>(Scratch::Delta, tile.columns * stride); // (columns, stride)
  transpose_pairs(narrow_tile(matrix, tile, Scratch::Narrow), tile.rows, tile.columns, pairs, stride);
  for (int64_t i = 0; i < tile.columns; i += 2) {
    Narrow* row = transpose + i * stride;
    if (tile.rows < stride) {
      row[tile.rows] = row[stride + tile.rows] = Narrow(0, Narrow::from_bits());
    }
    unweave(pairs + i * stride, tile.rows, row, row + stride);
  }
  add_sums(transpose, stride);
  return {transpose, DType::BFloat16, stride};
}

// The tile as it is, as a second factor: (tile.rows, tile.columns). With an odd number of rows one of zeros is added.
template <typename Acc>
inline Matrix second_factor(const Matrix& matrix, const Tile& tile, bool narrow) {
  if (!narrow) {
    return {row_pointer<Acc>(matrix, tile.row) + tile.column, matrix.dtype, matrix.stride};
  }
  const auto rows = narrow_tile(matrix, tile, Scratch::Narrow);
  const int64_t n_pairs = (tile.rows + 1) / 2;
  Narrow* pairs = scratch_of<Narrow>(Scratch::Factor, 2 * n_pairs * tile.columns); // (n_pairs, columns, 2)
  for (int64_t i = 0; i < n_pairs; ++i) {
    const bool is_whole = 2 * i + 1 < tile.rows;
    const Narrow* odd = is_whole ? rows.row(2 * i + 1) : scratch_of<Narrow>(Scratch::Vector, tile.columns);
    if (!is_whole) {
      std::memset(const_cast<Narrow*>(odd), 0, tile.columns * sizeof(Narrow));
    }
    weave(rows.row(2 * i), odd, tile.columns, pairs + 2 * i * tile.columns);
  }
  return {pairs, DType::BFloat16, tile.columns};
}

// The transpose of the tile as a second factor: (tile.columns, tile.rows), rows kPanel apart. In bfloat16 the columns
// are even in number.
template <typename Acc>
inline Matrix transposed_second_factor(const Matrix& matrix, const Tile& tile, bool narrow) {
  if (narrow) {
    Narrow* pairs = scratch_of<Narrow>(Scratch::Factor, tile.columns * kPanel); // (columns / 2, kPanel, 2)
    transpose_pairs(narrow_tile(matrix, tile, Scratch::Narrow), tile.rows, tile.columns, pairs, kPanel);
    return {pairs, DType::BFloat16, kPanel};
  }
  Acc* transpose = scratch_of<Acc>(Scratch::Factor, tile.columns * kPanel); // (columns, kPanel)
  const Acc* source = row_pointer<Acc>(matrix, tile.row) + tile.column;
  transpose_matrix(source, matrix.stride, tile.rows, tile.columns, transpose, kPanel);
  return {transpose, dtype_of<Acc>(), kPanel};
}

} // namespace CPU_CAPABILITY
} // namespace lgd
