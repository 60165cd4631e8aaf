// What is made of the raw logits of a layer, a group at a time; the equations are in
// lgd_kernels/reference/local_residual.py.
#pragma once

#include "../common/layers.h"
#include "elementary.cuh"
#include "groups.cuh"

namespace lgd::gpu {

// What stands around the raw logits of a layer; null where it is absent or not wanted.
template <typename T>
struct ResidualPointers {
  const T *target, *multiplier, *skip_input;
  T *residual, *delta, *q;
};

// From row to row, the same in all layers of a launch.
struct ResidualStrides {
  int64_t target, multiplier, skip_input, residual, delta, q;
};

template <typename Acc>
struct ResidualNumbers {
  Acc rho, skip, dual_step;
  int activation;
};

template <typename Acc>
struct HiddenLossNumbers {
  Acc kappa;
  int code;
};

inline ResidualStrides strides_of(const ResidualIo& io) {
  return {io.target.stride,   io.multiplier.stride, io.skip_input.stride,
          io.residual.stride, io.delta.stride,      io.q.stride};
}

// A skip of 0 does not look at what it skips: 0 * inf would be NaN.
template <typename T>
ResidualPointers<T> pointers_of(const ResidualIo& io, double skip) {
  return {
      static_cast<const T*>(io.target.data),
      static_cast<const T*>(io.multiplier.data),
      static_cast<const T*>(skip == 0 ? nullptr : io.skip_input.data),
      static_cast<T*>(io.residual.data),
      static_cast<T*>(io.delta.data),
      static_cast<T*>(io.q.data)};
}

template <typename Acc>
ResidualNumbers<Acc> numbers_of(const LayerOptions& o, int64_t activation) {
  return {
      static_cast<Acc>(o.rho), static_cast<Acc>(o.skip), static_cast<Acc>(o.dual_step), static_cast<int>(activation)};
}

template <typename Acc>
HiddenLossNumbers<Acc> numbers_of(const HiddenLoss& loss) {
  return {static_cast<Acc>(loss.kappa), static_cast<int>(loss.code)};
}

// (f(a), f'(a)) for the activation with this code; `value` may be `a`. The switch is outside of the loop: it costs a
// group one jump.
template <typename Acc, int W>
LGD_DEVICE void activate(int code, const Acc (&a)[W], Acc (&value)[W], Acc (&slope)[W]) {
  with_activation(code, [&](auto function) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const Activated<Acc> y = decltype(function)::at(a[i]);
      value[i] = y.value;
      slope[i] = y.slope;
    }
  });
}

template <typename T>
LGD_DEVICE T* shifted(T* start, int64_t stride, const Place& p) {
  return start == nullptr ? nullptr : start + p.row * stride + p.column;
}

// A group of a layer: its inputs, which are all read before anything is written, and where its outputs go.
template <typename T>
struct ResidualGroup {
  ResidualPointers<T> at;
  int count;
  Words<4> target, multiplier, skip_input;

  LGD_DEVICE ResidualGroup(const ResidualPointers<T>& layer, const ResidualStrides& strides, const Place& p)
      : at{shifted(layer.target, strides.target, p),         shifted(layer.multiplier, strides.multiplier, p),
           shifted(layer.skip_input, strides.skip_input, p), shifted(layer.residual, strides.residual, p),
           shifted(layer.delta, strides.delta, p),           shifted(layer.q, strides.q, p)},
        count(p.count),
        target(load_group(at.target, count)),
        multiplier(load_group(at.multiplier, count)),
        skip_input(load_group(at.skip_input, count)) {}
};

// Stores what is wanted of a group with these raw logits; returns its energy.
template <typename T, typename Acc, int W>
LGD_DEVICE Acc judge(
    const Acc (&logits)[W], const ResidualGroup<T>& group, const ResidualNumbers<Acc>& n,
    const HiddenLossNumbers<Acc>& loss) {
  Acc prediction[W], slope[W], given[W], e[W], q[W], energy[W];
  activate(n.activation, logits, prediction, slope);
  if (group.at.skip_input != nullptr) {
    unpack<T>(group.skip_input, given);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      prediction[i] += n.skip * given[i];
    }
  }
  unpack<T>(group.target, given);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    e[i] = given[i] - prediction[i];
  }
  with_hidden_loss(loss.code, [&](auto function) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const Activated<Acc> y = decltype(function)::at(e[i], loss.kappa);
      energy[i] = n.rho * y.value;
      q[i] = n.rho * y.slope;
    }
  });
  if (group.at.multiplier != nullptr || n.dual_step != 0) {
    unpack<T>(group.multiplier, given); // zeros if there is none
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const Acc lambda = n.dual_step == 0 ? given[i] : given[i] + n.dual_step * e[i]; // also of an infinite e
      q[i] += lambda;
      energy[i] += lambda * e[i];
    }
  }
  store_group(group.at.residual, group.count, e);
  store_group(group.at.q, group.count, q);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    slope[i] = -q[i] * slope[i];
    energy[i] = i < group.count ? energy[i] : Acc(0);
  }
  store_group(group.at.delta, group.count, slope);
  return tree_sum(energy);
}

} // namespace lgd::gpu
