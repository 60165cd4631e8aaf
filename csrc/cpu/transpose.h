// Transposes between rows and tiles with one row per lane, in pieces of 16 bytes: those are what a load can put in any
// part of a vector, so that only the classes of one piece have to be sorted by shuffles (for 16 rows of 10 floats 36
// shuffles, where the transpose of a 16 x 16 tile takes 64).
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <utility>

namespace lgd {
inline namespace CPU_CAPABILITY {

template <typename Acc>
struct Pieces {
  static constexpr int V = at::vec::Vectorized<Acc>::size();
  static constexpr int kClasses = 16 / sizeof(Acc); // of one piece
  static constexpr int kPerVector = V / kClasses;
  typedef Acc Piece __attribute__((vector_size(16)));
  typedef Acc Lanes __attribute__((vector_size(V * sizeof(Acc))));

  // tile[j * stride + lane] = source(lane)[j] for j < kClasses.
  template <typename Source>
  static inline void load(const Source& source, Acc* tile, int64_t stride = V) {
    Lanes rows[kClasses];
#pragma GCC unroll 4
    for (int k = 0; k < kClasses; ++k) {
      const auto piece = [&](int part) {
        Piece p;
        std::memcpy(&p, source(part * kClasses + k), sizeof(p));
        return p;
      };
      if constexpr (kPerVector == 2) {
        rows[k] = joined(piece(0), piece(1));
      } else {
        rows[k] = joined(joined(piece(0), piece(1)), joined(piece(2), piece(3)));
      }
    }
    transpose(rows);
#pragma GCC unroll 4
    for (int k = 0; k < kClasses; ++k) {
      std::memcpy(tile + k * stride, &rows[k], sizeof(Lanes));
    }
  }

  // target(lane)[j] = tile[j * V + lane] for j < kClasses.
  template <typename Target>
  static inline void store(const Acc* tile, const Target& target) {
    Lanes rows[kClasses];
#pragma GCC unroll 4
    for (int k = 0; k < kClasses; ++k) {
      std::memcpy(&rows[k], tile + k * V, sizeof(Lanes));
    }
    transpose(rows);
#pragma GCC unroll 4
    for (int k = 0; k < kClasses; ++k) {
      [&]<int... part>(std::integer_sequence<int, part...>) {
        (store_part<part>(rows[k], target(part * kClasses + k)), ...);
      }(std::make_integer_sequence<int, kPerVector>{});
    }
  }

 private:
  template <typename Half>
  static inline auto joined(Half a, Half b) {
    return [&]<int... lane>(std::integer_sequence<int, lane...>) {
      return __builtin_shufflevector(a, b, lane...);
    }(std::make_integer_sequence<int, 2 * sizeof(Half) / sizeof(Acc)>{});
  }

  template <int part>
  static inline void store_part(Lanes row, Acc* target) {
    [&]<int... lane>(std::integer_sequence<int, lane...>) {
      const Piece piece = __builtin_shufflevector(row, row, (part * kClasses + lane)...);
      std::memcpy(target, &piece, sizeof(piece));
    }(std::make_integer_sequence<int, kClasses>{});
  }

  // Transposes the kClasses x kClasses blocks that lie at the same place of all rows, in butterfly steps.
  static inline void transpose(Lanes (&rows)[kClasses]) {
    butterfly<1>(rows);
    if constexpr (kClasses == 4) {
      butterfly<2>(rows);
    }
  }

  template <int step>
  static inline void butterfly(Lanes (&rows)[kClasses]) {
    [&]<int... lane>(std::integer_sequence<int, lane...>) {
#pragma GCC unroll 4
      for (int k = 0; k < kClasses; ++k) {
        if ((k & step) == 0) {
          const Lanes a = rows[k], b = rows[k | step];
          rows[k] = __builtin_shufflevector(a, b, ((lane & step) == 0 ? lane : V + (lane ^ step))...);
          rows[k | step] = __builtin_shufflevector(a, b, ((lane & step) == 0 ? lane ^ step : V + lane)...);
        }
      }
    }(std::make_integer_sequence<int, V>{});
  }
};

// target[c * target_stride + r] = source[r * source_stride + c] for r < rows, c < columns. Whatever the bytes of an
// element are: nothing is read as a number.
template <typename Acc>
inline void transpose_matrix(
    const Acc* source, int64_t source_stride, int64_t rows, int64_t columns, Acc* target, int64_t target_stride) {
  constexpr int64_t V = Pieces<Acc>::V, kPiece = Pieces<Acc>::kClasses;
  const int64_t whole_rows = rows / V * V, whole_columns = columns / kPiece * kPiece;
  const auto one_by_one = [&](int64_t r, int64_t first, int64_t end) {
    for (int64_t c = first; c < end; ++c) {
      std::memcpy(target + c * target_stride + r, source + r * source_stride + c, sizeof(Acc));
    }
  };
  for (int64_t r = 0; r < whole_rows; r += V) {
    for (int64_t c = 0; c < whole_columns; c += kPiece) {
      const auto row = [&](int lane) { return source + (r + lane) * source_stride + c; };
      Pieces<Acc>::load(row, target + c * target_stride + r, target_stride);
    }
    for (int64_t lane = r; lane < r + V; ++lane) {
      one_by_one(lane, whole_columns, columns);
    }
  }
  for (int64_t r = whole_rows; r < rows; ++r) {
    one_by_one(r, 0, columns);
  }
}

} // namespace CPU_CAPABILITY
} // namespace lgd
