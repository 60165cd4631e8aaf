// What activations are made of, for at::vec vectors.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "../common/activations.h"
#include "vec_math.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

template <typename T>
struct Elementary<at::vec::Vectorized<T>> {
  using Vec = at::vec::Vectorized<T>;

  static Vec constant(double c) { return Vec(static_cast<T>(c)); }
  static Vec exp_nonpositive(Vec x) { return lgd::exp_nonpositive(x); }
  static Activated<Vec> tanh(Vec x) {
    Activated<Vec> y;
    tanh_with_slope(x, y.value, y.slope);
    return y;
  }
  static Vec erf(Vec x) { return x.erf(); }
  static Vec sqrt(Vec x) { return x.sqrt(); }
  static Vec not_below(Vec x, Vec low) { return at::vec::clamp_min(x, low); }
  static Vec not_above(Vec x, Vec high) { return at::vec::clamp_max(x, high); }
  static Vec where_positive(Vec x, Vec a, Vec b) { return where_nan(x, x, where_less(Vec(T(0)), x, a, b)); }
};

} // namespace CPU_CAPABILITY
} // namespace lgd
