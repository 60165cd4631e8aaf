// In-register transposes of V x V tiles, V the number of lanes of a vector.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

namespace lgd {
inline namespace CPU_CAPABILITY {

// Lane i of one butterfly step over two vectors of V lanes whose partners are `step` apart.
constexpr int butterfly_lane(int lane, int step, int V, bool second) {
  const int from_other = (lane & step) != 0;
  if (!second) {
    return from_other ? V + (lane ^ step) : lane;
  }
  return from_other ? V + lane : lane ^ step;
}

// tile[i][j] <-> tile[j][i] for a tile of V rows of V elements, in log2(V) butterfly steps.
template <typename Acc>
inline void transpose_tile(Acc* tile) {
  constexpr int V = at::vec::Vectorized<Acc>::size();
  typedef Acc Lanes __attribute__((vector_size(V * sizeof(Acc))));
  Lanes rows[V];
  std::memcpy(rows, tile, sizeof(rows));
  const auto step_all = [&]<int step>(std::integral_constant<int, step>) {
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
    (step_all(std::integral_constant<int, (1 << log)>{}), ...);
  }(std::make_integer_sequence<int, std::countr_zero(static_cast<unsigned>(V))>{});
  std::memcpy(tile, rows, sizeof(rows));
}

} // namespace CPU_CAPABILITY
} // namespace lgd
