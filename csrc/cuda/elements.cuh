// Elements of the dtypes of tensors, as numbers of the accumulation type and back.
#pragma once

#include "../common/dtype.h"
#include "primitives.cuh"

namespace lgd::gpu {

// The type that elements of T are computed in.
template <typename T>
using Accumulated = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f(T{}) for elements of a dtype that are computed in Acc.
template <typename Acc, typename F>
int with_element(DType dtype, const F& f) {
  if constexpr (std::is_same_v<Acc, double>) {
    return f(double{});
  } else {
    switch (dtype) {
      case DType::BFloat16:
        return f(BFloat16{});
      case DType::Float16:
        return f(Float16{});
      default:
        return f(float{});
    }
  }
}

template <typename T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T)); // elements in 128 bits

template <typename A, typename T>
LGD_DEVICE A number_from(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<A>(x);
  } else {
    return static_cast<A>(to_float(x));
  }
}

template <typename T, typename A>
LGD_DEVICE T element_from(A x) {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(x);
  } else {
    return {static_cast<uint16_t>(round_pair<T>(static_cast<float>(x), 0.0f))};
  }
}

template <typename T, int W>
constexpr int kWords = W * static_cast<int>(sizeof(T)) / 4;

template <typename T, typename A, int W>
LGD_DEVICE void unpack(const Words<kWords<T, W>>& words, A (&x)[W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if constexpr (sizeof(T) == 8) {
      const uint64_t bits = words.word[2 * i] | static_cast<uint64_t>(words.word[2 * i + 1]) << 32;
      x[i] = static_cast<A>(bits_as<T>(bits));
    } else if constexpr (sizeof(T) == 4) {
      x[i] = static_cast<A>(bits_as<T>(words.word[i]));
    } else {
      const uint32_t bits = words.word[i / 2];
      x[i] = number_from<A>(T{static_cast<uint16_t>(i % 2 == 0 ? bits : bits >> 16)});
    }
  }
}

template <typename T, typename A, int W>
LGD_DEVICE Words<kWords<T, W>> pack(const A (&x)[W]) {
  Words<kWords<T, W>> words;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if constexpr (sizeof(T) == 8) {
      const uint64_t bits = bits_as<uint64_t>(static_cast<T>(x[i]));
      words.word[2 * i] = static_cast<uint32_t>(bits);
      words.word[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    } else if constexpr (sizeof(T) == 4) {
      words.word[i] = bits_as<uint32_t>(static_cast<T>(x[i]));
    } else if (i % 2 == 0) {
      words.word[i / 2] = round_pair<T>(static_cast<float>(x[i]), static_cast<float>(x[i + 1]));
    }
  }
  return words;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums that keep what rounding drops
// ---------------------------------------------------------------------------------------------------------------------

template <typename A, int W>
LGD_DEVICE A tree_sum(const A (&x)[W]) {
  A partial[W];
#pragma unroll
  for (int i = 0; i < W; ++i) {
    partial[i] = x[i];
  }
#pragma unroll
  for (int half = W / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
      partial[i] += partial[i + half];
    }
  }
  return partial[0];
}

// A sum of many terms: equal small terms added one by one to a large sum would all be rounded alike.
template <typename A>
struct Total {
  A sum = 0, dropped = 0;

  LGD_DEVICE void add(A x) {
    const A before = sum;
    sum = before + x;
    const A taken = sum - before;
    dropped += (before - (sum - taken)) + (x - taken);
  }
  LGD_DEVICE A value() const { return is_nan(dropped) ? sum : sum + dropped; } // dropped is NaN where sum is infinite
};

} // namespace lgd::gpu
