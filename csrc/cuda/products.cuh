// Products of matrices in shared memory, by the warps of a block: on tensor cores or, where they would round, without.
#pragma once

#include "elements.cuh"

namespace lgd::gpu {

// Element (i, k) of an operand: a matrix in rows that are aligned to 16 bytes, or the transpose of one.
template <typename E, bool is_transposed>
struct View {
  static constexpr bool transposed = is_transposed;
  const E* data;
  int stride;

  LGD_DEVICE const E* at(int i, int k) const { return data + (transposed ? k * stride + i : i * stride + k); }
};

// How fragments are read and multiplied. `a` has 16 rows from `row` on, `b` is given as its transpose and has 8 columns
// from `column` on; kDepth terms of every sum at a time, from k on. The sums lie as primitives.cuh says of d.

// In the operands' own type.
template <typename E>
struct Exact {
  using Element = E;
  static constexpr int kDepth = 16 / static_cast<int>(sizeof(E));
  struct Fragment {
    E of[2][kDepth]; // of two rows of a, or two columns of b
  };

  static LGD_DEVICE E rounded(E x) { return x; }

  template <typename V>
  static LGD_DEVICE Fragment load(const V& x, int first, int second, int k) {
    Fragment f;
    const int lines[2] = {first, second};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (V::transposed) {
#pragma unroll
        for (int j = 0; j < kDepth; ++j) {
          f.of[i][j] = *x.at(lines[i], k + j);
        }
      } else {
        unpack<E>(gpu::load<4>(x.at(lines[i], k)), f.of[i]);
      }
    }
    return f;
  }
  template <typename V>
  static LGD_DEVICE Fragment load_a(const V& a, int row, int k, int lane) {
    return load(a, row + lane / 4, row + lane / 4 + 8, k);
  }
  template <typename V>
  static LGD_DEVICE Fragment load_b(const V& b, int column, int k, int lane) {
    return load(b, column + lane % 4 * 2, column + lane % 4 * 2 + 1, k);
  }
  static LGD_DEVICE void multiply_add(E (&sum)[4], const Fragment& a, const Fragment& b) {
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] += a.of[i / 2][j] * b.of[i % 2][j];
      }
    }
  }
};

// In 16 bits, summed in float.
template <typename E>
struct Halves {
  using Element = E;
  static constexpr int kDepth = 16;
  struct A {
    uint32_t of[4];
  };
  struct B {
    uint32_t of[2];
  };

  static LGD_DEVICE float rounded(float x) { return x; } // as it is stored

  template <typename V>
  static LGD_DEVICE A load_a(const V& a, int row, int k, int lane) {
    A f; // matrix m: rows from 8 (m % 2) on, terms from 8 (m / 2) on
    const int i = row + lane / 8 % 2 * 8, first = k + lane / 16 * 8, r = lane % 8;
    load_matrices<V::transposed>(V::transposed ? a.at(i, first + r) : a.at(i + r, first), f.of);
    return f;
  }
  template <typename V>
  static LGD_DEVICE B load_b(const V& b, int column, int k, int lane) {
    B f; // lanes from 16 on are not asked
    const int first = k + lane / 8 % 2 * 8, r = lane % 8;
    load_matrices<V::transposed>(V::transposed ? b.at(column, first + r) : b.at(column + r, first), f.of);
    return f;
  }
  static LGD_DEVICE void multiply_add(float (&sum)[4], const A& a, const B& b) { multiply_halves<E>(sum, a.of, b.of); }
};

// In TF32, summed in float.
struct Tf32 {
  using Element = float;
  static constexpr int kDepth = 8;
  struct A {
    uint32_t of[4];
  };
  struct B {
    uint32_t of[2];
  };

  static LGD_DEVICE float rounded(float x) { return round_to_tf32(x); }

  template <typename V>
  static LGD_DEVICE A load_a(const V& a, int row, int k, int lane) {
    A f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f.of[i] = bits_as<uint32_t>(*a.at(row + lane / 4 + i % 2 * 8, k + lane % 4 + i / 2 * 4));
    }
    return f;
  }
  template <typename V>
  static LGD_DEVICE B load_b(const V& b, int column, int k, int lane) {
    B f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      f.of[i] = bits_as<uint32_t>(*b.at(column + lane / 4, k + lane % 4 + i * 4));
    }
    return f;
  }
  static LGD_DEVICE void multiply_add(float (&sum)[4], const A& a, const B& b) { multiply_tf32(sum, a.of, b.of); }
};

// What a warp has of a product: 16 rows, and up to N times 8 columns that are `step` apart.
template <typename Acc, int N>
struct ProductSums {
  int row, column, step;
  Acc of[N][4] = {};

  // Warps are dealt out to blocks of 16 rows in turn, those of the same rows to columns in turn.
  LGD_DEVICE ProductSums(int row_blocks, int warps)
      : row(static_cast<int>(threadIdx.x) / kWarp % row_blocks * 16),
        column(static_cast<int>(threadIdx.x) / kWarp / row_blocks * 8),
        step(warps / row_blocks * 8) {}

  // Adds a (rows, depth) b (depth, columns), for rows and columns that are multiples of 16.
  template <typename Multiply, typename A, typename B>
  LGD_DEVICE void add(const A& a, const B& b, int rows, int columns, int depth) {
    const int lane = threadIdx.x % kWarp;
    if (row >= rows) {
      return;
    }
    for (int k = 0; k < depth; k += Multiply::kDepth) {
      const auto of_a = Multiply::load_a(a, row, k, lane);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (column + n * step < columns) {
          Multiply::multiply_add(of[n], of_a, Multiply::load_b(b, column + n * step, k, lane));
        }
      }
    }
  }

  // f(row, column, the sum there and the one to the right of it)
  template <typename F>
  LGD_DEVICE void for_pairs(int rows, int columns, const F& f) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (row < rows && column + n * step < columns) {
        f(row + lane / 4, column + n * step + lane % 4 * 2, of[n][0], of[n][1]);
        f(row + lane / 4 + 8, column + n * step + lane % 4 * 2, of[n][2], of[n][3]);
      }
    }
  }
};

} // namespace lgd::gpu
