// In-register transposes of V x V tiles, V the number of lanes of a vector.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

namespace lgd {
inline namespace CPU_CAPABILITY {

// Lane `lane` of one butterfly step over two vectors of V lanes, whose partners are `step` apart.
constexpr int butterfly_lane(int lane, int step, int V, bool second) {
  const bool from_other = (lane & step) != 0;
  if (second) {
    return from_other ? V + lane : lane ^ step;
  }
  return from_other ? V + (lane ^ step) : lane;
}

// store(j, column j) for j < n, where load(i) is row i: transposed in log2(V) butterfly steps.
template <typename Acc, typename Load, typename Store>
inline void transpose_tile(int64_t n, const Load& load, const Store& store) {
  using Vec = at::vec::Vectorized<Acc>;
  constexpr int V = Vec::size();
  typedef Acc Lanes __attribute__((vector_size(V * sizeof(Acc))));
  static_assert(sizeof(Vec) == sizeof(Lanes));
  Lanes rows[V];
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i) {
    const Vec row = load(i);
    std::memcpy(&rows[i], &row, sizeof(row));
  }
  const auto butterfly = [&]<int step>(std::integral_constant<int, step>) {
    [&]<int... lane>(std::integer_sequence<int, lane...>) {
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) {
        if ((i & step) == 0) {
          const Lanes a = rows[i], b = rows[i | step];
          rows[i] = __builtin_shufflevector(a, b, butterfly_lane(lane, step, V, false)...);
          rows[i | step] = __builtin_shufflevector(a, b, butterfly_lane(lane, step, V, true)...);
        }
      }
    }(std::make_integer_sequence<int, V>{});
  };
  [&]<int... log>(std::integer_sequence<int, log...>) {
    (butterfly(std::integral_constant<int, (1 << log)>{}), ...);
  }(std::make_integer_sequence<int, std::countr_zero(static_cast<unsigned>(V))>{});
#pragma GCC unroll 16
  for (int j = 0; j < V; ++j) {
    if (j < n) {
      Vec column;
      std::memcpy(static_cast<void*>(&column), &rows[j], sizeof(column));
      store(j, column);
    }
  }
}

} // namespace CPU_CAPABILITY
} // namespace lgd
