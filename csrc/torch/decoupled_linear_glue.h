// The functions of decoupled_linear between tensors and kernels, as far as they are the same for every device.
//
// A Device has the accumulation type Acc, the kernels' struct Layer with what it contains, LinearLayers, which makes
// its first part for every layer of a stack, and static functions: `run` calls the kernel on all layers, and `backward`
// is the whole op of that name.
#pragma once

#include <ATen/ops/empty.h>

#include <span>
#include <tuple>
#include <vector>

#include "stacks.h"

namespace lgd {

using Shape = std::vector<int64_t>;

// The arguments of decoupled_linear, with one entry of `options` for every layer.
struct LinearForward {
  const TensorList &z, &weight;
  const OptionalTensorList& bias;
  const TensorList& target;
  const OptionalTensorList& multiplier;
  std::vector<LayerOptions> options;
  bool preactivation;
  HiddenLoss hidden_loss;
  const std::vector<bool>&need_residual, &need_gradient;
};

// And of decoupled_linear_backward.
struct LinearBackward {
  const TensorList &z, &weight, &e, &delta, &q;
  const OptionalTensor& grad_energy;
  std::vector<LayerOptions> options;
  bool preactivation;
  const std::vector<bool>&need_z, &need_weight, &need_bias, &need_target, &need_multiplier;
};

using LinearResults = std::tuple<at::Tensor, TensorList, TensorList, TensorList>;
using LinearGradients = std::tuple<TensorList, TensorList, TensorList, TensorList, TensorList>;

// Of a stack; a tensor without the dimension T is one layer.
inline int64_t count_layers(const at::Tensor& z) {
  return z.dim() == 2 ? 1 : z.size(0);
}

inline Shape shape_of_outputs(const at::Tensor& z, const at::Tensor& weight) {
  Shape shape = z.sizes().vec();
  shape.back() = weight.size(-2);
  return shape;
}

// Outputs of one kind, an entry for each stack.
struct Outputs {
  TensorList tensors;
  Stack last; // the entry that was added last

  void add(bool needed, at::IntArrayRef shape, const at::Tensor& like) {
    tensors.push_back(needed ? empty_stack(shape, like) : empty(like));
    last = stack_output(tensors.back(), needed);
  }
};

// What only some of the outputs need: it may be anything where none of them is wanted.
inline OptionalTensor if_needed(bool needed, const at::Tensor& tensor) {
  return needed ? OptionalTensor(tensor) : std::nullopt;
}

template <typename Device>
LinearResults linear_forward(const LinearForward& a) {
  using Acc = typename Device::Acc;
  struct Inputs {
    typename Device::LinearLayers linear;
    StackInput target, multiplier;
  };
  std::vector<Inputs> inputs; // alive until the kernel is started
  std::vector<typename Device::Layer> layers;
  Outputs residual, delta, q;
  for (size_t i = 0; i < a.z.size(); ++i) {
    const Shape shape = shape_of_outputs(a.z[i], a.weight[i]);
    const int64_t n_layers = count_layers(a.z[i]);
    const auto of_stack = std::span(a.options).subspan(layers.size(), n_layers);
    const Inputs& of = inputs.emplace_back(
        typename Device::LinearLayers(a.z[i], a.weight[i], a.bias[i], a.preactivation, of_stack),
        StackInput(a.target[i], shape, "target"), StackInput(a.multiplier[i], shape, "multiplier"));
    residual.add(a.need_residual[i], shape, a.z[i]);
    delta.add(a.need_gradient[i], shape, a.z[i]);
    q.add(a.need_gradient[i], shape, a.z[i]);
    for (int64_t t = 0; t < n_layers; ++t) {
      typename Device::Layer& layer = layers.emplace_back();
      layer.linear = of.linear[t];
      layer.io = {of.target.stack.layer(t), of.multiplier.stack.layer(t), layer.linear.z, {},
                  residual.last.layer(t),   delta.last.layer(t),          q.last.layer(t)};
    }
  }
  const at::TensorOptions options = a.z[0].options().dtype(c10::CppTypeToScalarType<Acc>::value);
  const at::Tensor energy = at::empty({static_cast<int64_t>(layers.size())}, options);
  Device::run(a, layers, energy);
  return {energy, residual.tensors, delta.tensors, q.tensors};
}

} // namespace lgd
