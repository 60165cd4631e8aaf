// The last pass over a row: p_factor * exponentials - h_factor * H.
#pragma once

#include <cstdint>
#include <limits>

#include "infogain.h"
#include "stream.h"
#include "vec_math.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

// The elements i .. i + n, the entries of H left out.
template <Base base, typename Acc>
struct GradientVectors {
  using Vec = Vectorized<Acc>;
  const Acc *exponentials, *h;
  Vec p, minus_h, constant;

  GradientVectors(const Acc* exponentials, const Acc* h, Acc background, Acc p_factor, Acc h_factor)
      : exponentials(exponentials), h(h), p(p_factor), minus_h(-h_factor), constant(-h_factor * background) {}

  Vec operator()(int64_t i, int64_t n) const {
    Vec g = Vec::loadu(exponentials + i, n) * p;
    if constexpr (base == Base::Constant) {
      g = g + constant;
    }
    if constexpr (base == Base::Dense) {
      g = at::vec::fmadd(Vec::loadu(h + i, n), minus_h, g);
    }
    return g;
  }

  void store(int64_t count, Acc* gradient) const {
    constexpr int64_t V = Vec::size();
    int64_t i = 0;
    for (; i + V <= count; i += V) {
      (*this)(i, V).store(gradient + i);
    }
    if (i < count) {
      (*this)(i, count - i).store(gradient + i, count - i);
    }
  }
};

// The largest element of a row, found in a loop over another row that leaves the load units idle: a streaming one, at
// (8192, 1000) with a dense H 2.13 -> 2.02 ms. Fetches what lies from `fetched` on while it goes over what lies before.
template <typename Acc>
class MaxAlong {
  using Vec = Vectorized<Acc>;
  const Acc* row;
  int64_t fetched;
  Vec max{-std::numeric_limits<Acc>::infinity()};

 public:
  MaxAlong(const Acc* row, int64_t fetched) : row(row), fetched(fetched) {}

  void see(int64_t i) {
    if (i <= fetched) {
      __builtin_prefetch(row + fetched + i);
    }
    max = at::vec::clamp_min(max, Vec::loadu(row + i));
  }
  void see(int64_t i, int64_t n) { max = at::vec::clamp_min(max, first_lanes(n, Vec::loadu(row + i, n), max)); }
  Acc result() const { return max_of_lanes(max); }
};

// The gradient of a chunk with its entries, from registers to `target` around the cache. (By way of a block in the
// cache, the call took 1.7 times as long in one process out of eight; that block and the exponentials at a multiple of
// 4 KB from each other may be why. Spread over the arithmetic of the next row, the call was 10 to 20 % slower.)
template <Base base, typename Acc>
inline void stream_gradient(
    const GradientVectors<base, Acc>& vectors, Acc p_factor, Acc h_factor, const Entries<Acc>& entries, int64_t begin,
    int64_t count, Acc* target, MaxAlong<Acc>& next_row) {
  using Vec = Vectorized<Acc>;
  constexpr int64_t V = Vec::size();
  const auto entry = [&](int64_t i) { // where it lies in the chunk; `count` for none, or one in a later chunk
    return i < entries.count && entries.col[i] - begin < count ? entries.col[i] - begin : count;
  };
  int64_t next = 0;
  while (entry(next) < 0) {
    ++next;
  }
  for (int64_t i = 0; i < count;) {
    const int64_t to_boundary = V - reinterpret_cast<uintptr_t>(target + i) / sizeof(Acc) % V;
    const int64_t n = count - i < to_boundary ? count - i : to_boundary;
    if (n == V && entry(next) >= i + V) {
      const int64_t end = entry(next);
      for (; i + V <= end; i += V) {
        stream_vector(target + i, vectors(i, V));
        next_row.see(i);
      }
      continue;
    }
    // entries go into the register: a vector put together in memory and loaded would wait for all stores before it
    Vec piece = vectors(i, n);
    next_row.see(i, n);
    for (; entry(next) < i + n; ++next) {
      const int64_t k = entry(next);
      const Acc value = p_factor * vectors.exponentials[k] - h_factor * entries.value[next];
      piece = where_equal(Vec::arange(Acc(0), Acc(1)), Vec(static_cast<Acc>(k - i)), Vec(value), piece);
    }
    if (n == V) {
      stream_vector(target + i, piece);
    } else {
      piece.store(target + i, n);
    }
    i += n;
  }
}

} // namespace CPU_CAPABILITY
} // namespace lgd
