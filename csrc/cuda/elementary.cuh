// What activations are made of, for the numbers of a thread.
#pragma once

#include <cmath>

#include "../common/activations.h"

namespace lgd {
inline namespace LGD_TARGET {

template <typename A>
struct ElementaryOfNumbers {
  static LGD_HOST_DEVICE A constant(double c) { return static_cast<A>(c); }
  static LGD_HOST_DEVICE A exp_nonpositive(A x) { return std::exp(x); }
  static LGD_HOST_DEVICE A erf(A x) { return std::erf(x); }
  static LGD_HOST_DEVICE Activated<A> tanh(A x) {
    const A t = std::exp(-2 * std::abs(x)), inverse = 1 / (1 + t);
    return {std::tanh(x), 4 * t * inverse * inverse};
  }
  static LGD_HOST_DEVICE A not_below(A x, A low) { return x < low ? low : x; } // NaN is not below anything
  static LGD_HOST_DEVICE A not_above(A x, A high) { return x > high ? high : x; }
  static LGD_HOST_DEVICE A where_positive(A x, A a, A b) { return x > 0 ? a : x <= 0 ? b : x; }
};

template <>
struct Elementary<float> : ElementaryOfNumbers<float> {};
template <>
struct Elementary<double> : ElementaryOfNumbers<double> {};

} // namespace LGD_TARGET
} // namespace lgd
