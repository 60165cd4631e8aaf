// Activations with their derivatives, and hidden losses with theirs; the equations are those of
// lgd_kernels/reference/activations.py. V is a number, or a vector of numbers to be treated alike. What the formulas
// are made of is Elementary<V>, which every target defines:
//
//   erf(x)                        as usual
//   tanh(x)                       with its slope 1 - tanh(x)^2, which cancels near |tanh(x)| = 1 if computed like that
//   exp_nonpositive(x)            exp(x) for x <= 0
//   not_below(x, low)             the larger one, NaN if x is NaN; not_above likewise
//   where_positive(x, a, b)       a where x > 0, b where x <= 0, NaN where x is NaN
//   constant(c)                   V of a double
#pragma once

#include "target.h"

namespace lgd {
inline namespace LGD_TARGET {

template <typename V>
struct Elementary;

// f(a) and f'(a).
template <typename V>
struct Activated {
  V value, slope;
};

struct Identity {
  template <typename V>
  static LGD_HOST_DEVICE Activated<V> at(V a) {
    return {a, Elementary<V>::constant(1)};
  }
};

struct Relu {
  template <typename V>
  static LGD_HOST_DEVICE Activated<V> at(V a) {
    using E = Elementary<V>;
    const V zero = E::constant(0);
    return {E::not_below(a, zero), E::where_positive(a, E::constant(1), zero)};
  }
};

struct LeakyRelu {
  template <typename V>
  static LGD_HOST_DEVICE Activated<V> at(V a) {
    using E = Elementary<V>;
    const V slope = E::where_positive(a, E::constant(1), E::constant(0.01));
    return {a * slope, slope};
  }
};

struct Tanh {
  template <typename V>
  static LGD_HOST_DEVICE Activated<V> at(V a) {
    return Elementary<V>::tanh(a);
  }
};

// LeCun et al., "Efficient BackProp", 1998.
struct ScaledTanh {
  template <typename V>
  static LGD_HOST_DEVICE Activated<V> at(V a) {
    using E = Elementary<V>;
    constexpr double scale = 1.7159, stretch = 2.0 / 3;
    const Activated<V> y = E::tanh(E::constant(stretch) * a);
    return {E::constant(scale) * y.value, E::constant(scale * stretch) * y.slope};
  }
};

// sigma(a) and sigma(-a), both without cancellation.
template <typename V>
struct Sigmoids {
  V of, of_minus;

  LGD_HOST_DEVICE explicit Sigmoids(V a) {
    using E = Elementary<V>;
    const V one = E::constant(1), zero = E::constant(0);
    const V small = E::exp_nonpositive(E::not_above(a, zero) - E::not_below(a, zero)); // exp(-|a|)
    const V larger = one / (one + small), smaller = small * larger;
    of = E::where_positive(a, larger, smaller);
    of_minus = E::where_positive(a, smaller, larger);
  }
};

struct Sigmoid {
  template <typename V>
  static LGD_HOST_DEVICE Activated<V> at(V a) {
    const Sigmoids<V> sigma(a);
    return {sigma.of, sigma.of * sigma.of_minus};
  }
};

struct Silu {
  template <typename V>
  static LGD_HOST_DEVICE Activated<V> at(V a) {
    const Sigmoids<V> sigma(a);
    return {a * sigma.of, sigma.of * (Elementary<V>::constant(1) + a * sigma.of_minus)};
  }
};

struct Gelu {
  template <typename V>
  static LGD_HOST_DEVICE Activated<V> at(V a) {
    using E = Elementary<V>;
    const V below = E::constant(0.5) * (E::constant(1) + E::erf(a * E::constant(0.70710678118654752)));
    const V density = E::exp_nonpositive(E::constant(-0.5) * a * a) * E::constant(0.39894228040143268);
    return {a * below, below + a * density};
  }
};

// Hendrycks & Gimpel, arXiv:1606.08415.
struct GeluTanh {
  template <typename V>
  static LGD_HOST_DEVICE Activated<V> at(V a) {
    using E = Elementary<V>;
    constexpr double stretch = 0.79788456080286536, cubic = 0.044715;
    const V one = E::constant(1), half = E::constant(0.5), square = a * a;
    const Activated<V> y = E::tanh(E::constant(stretch) * a * (one + E::constant(cubic) * square));
    const V of_argument = E::constant(stretch) * (one + E::constant(3 * cubic) * square);
    return {half * a * (one + y.value), half * (one + y.value) + half * a * y.slope * of_argument};
  }
};

// f(Activation{}) for the position of its name in lgd_kernels.reference.ACTIVATIONS.
template <typename F>
LGD_HOST_DEVICE void with_activation(long code, const F& f) {
  switch (code) {
    case 0:
      return f(Identity{});
    case 1:
      return f(Relu{});
    case 2:
      return f(Tanh{});
    case 3:
      return f(ScaledTanh{});
    case 4:
      return f(Sigmoid{});
    case 5:
      return f(Silu{});
    case 6:
      return f(Gelu{});
    case 7:
      return f(GeluTanh{});
    default:
      return f(LeakyRelu{});
  }
}

// L(e) and L'(e); kappa is where Huber's becomes linear.
struct Squared {
  template <typename V>
  static LGD_HOST_DEVICE Activated<V> at(V e, V) {
    return {Elementary<V>::constant(0.5) * e * e, e};
  }
};

struct Huber {
  template <typename V>
  static LGD_HOST_DEVICE Activated<V> at(V e, V kappa) {
    using E = Elementary<V>;
    const V slope = E::not_above(E::not_below(e, E::constant(0) - kappa), kappa);
    return {slope * (e - E::constant(0.5) * slope), slope};
  }
};

// f(HiddenLoss{}) for the position of its name in lgd_kernels.reference.HIDDEN_LOSSES.
template <typename F>
LGD_HOST_DEVICE void with_hidden_loss(long code, const F& f) {
  return code == 0 ? f(Squared{}) : f(Huber{});
}

} // namespace LGD_TARGET
} // namespace lgd
