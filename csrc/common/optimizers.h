// One step of an optimizer for one number, or for a vector of numbers to be treated alike; in torch.optim's order of
// operations. Elementary<V> is that of activations.h, and has also
//
//   sqrt(x)                       as usual
#pragma once

#include "activations.h"
#include "target.h"

namespace lgd {
inline namespace LGD_TARGET {

// The numbers of a step, in V. What a rule does not name it does not read.
template <typename V>
struct UpdateNumbers {
  V lr, momentum, second_momentum, epsilon, l2, decay, root;
  V rest, second_rest; // 1 - momentum and 1 - second_momentum, which cancel in single precision
};

// A rule says what it works on: the parameter itself, and its first and second buffer.

// torch.optim.SGD without dampening: g += l2 w, v = momentum v + g, w -= lr v.
struct Sgd {
  static constexpr bool has_value = true, has_first = true, has_second = false;
  template <typename V>
  static LGD_HOST_DEVICE void step(const UpdateNumbers<V>& u, V g, V& w, V& first, V&) {
    g = g + u.l2 * w;
    first = u.momentum * first + g;
    w = w - u.lr * first;
  }
};

// The same without momentum, and without its buffer.
struct PlainSgd {
  static constexpr bool has_value = true, has_first = false, has_second = false;
  template <typename V>
  static LGD_HOST_DEVICE void step(const UpdateNumbers<V>& u, V g, V& w, V&, V&) {
    w = w - u.lr * (g + u.l2 * w);
  }
};

// torch.optim.Adam and AdamW (arXiv:1412.6980, arXiv:1711.05101): w *= decay, g += l2 w, m = momentum m + (1 -
// momentum) g, v = second_momentum v + (1 - second_momentum) g^2, w -= lr m / (sqrt(v) / root + epsilon), where lr and
// root hold the corrections of the bias.
struct Adam {
  static constexpr bool has_value = true, has_first = true, has_second = true;
  template <typename V>
  static LGD_HOST_DEVICE void step(const UpdateNumbers<V>& u, V g, V& w, V& first, V& second) {
    using E = Elementary<V>;
    w = w * u.decay;
    g = g + u.l2 * w;
    first = first + u.rest * (g - first);
    second = u.second_momentum * second + u.second_rest * g * g;
    w = w - u.lr * (first / (E::sqrt(second) / u.root + u.epsilon));
  }
};

// The gradient itself, put where the first buffer is.
struct KeepGradient {
  static constexpr bool has_value = false, has_first = true, has_second = false;
  template <typename V>
  static LGD_HOST_DEVICE void step(const UpdateNumbers<V>&, V g, V&, V& first, V&) {
    first = g;
  }
};

// f(Rule{}) for the position of its name in lgd_kernels.reference.UPDATE_RULES.
template <typename F>
inline void with_update_rule(long code, const F& f) {
  switch (code) {
    case 0:
      return f(KeepGradient{});
    case 1:
      return f(PlainSgd{});
    case 2:
      return f(Sgd{});
    default:
      return f(Adam{});
  }
}

} // namespace LGD_TARGET
} // namespace lgd
