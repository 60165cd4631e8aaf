// decoupled_linear between tensors and kernels.

#include "decoupled_linear.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <initializer_list>
#include <span>
#include <utility>

#include "../cpu/decoupled_linear.h"
#include "huge_pages.h"
#include "stacks.h"

namespace lgd {
namespace {

using Shape = std::vector<int64_t>;

// The tensor in the accumulation type; where it is not wider, itself.
template <typename Acc>
at::Tensor accumulated(const at::Tensor& tensor) {
  return tensor.to(c10::CppTypeToScalarType<Acc>::value);
}

// The layers of a stack as the kernels read them, with the tensors that they point to.
template <typename Acc>
class LinearLayers {
 public:
  LinearLayers(
      const at::Tensor& z, const at::Tensor& weight, const OptionalTensor& bias, bool preactivation,
      std::span<const LayerOptions> options, bool need_operand)
      : z_(z, z.sizes(), "z"),
        narrow_(takes_bfloat16_products(weight.scalar_type(), weight.size(-1), weight.size(-2))),
        weight_(narrow_ ? weight : accumulated<Acc>(weight), weight.sizes(), "weight"),
        bias_(
            bias ? OptionalTensor(accumulated<Acc>(*bias)) : std::nullopt, weight.sizes().slice(0, weight.dim() - 1),
            "bias"),
        preactivation_(preactivation),
        options_(options),
        operand_dtype_(dtype_of_tensor(weight, "weight")),
        operand_(z_.stack) {
    const at::ScalarType dtype = narrow_ ? at::kBFloat16 : c10::CppTypeToScalarType<Acc>::value;
    const bool is_z =
        z.scalar_type() == dtype && weight.scalar_type() == z.scalar_type() &&
        (!preactivation || std::all_of(options.begin(), options.end(), [](auto& o) { return o.activation == 0; }));
    if (need_operand && !is_z) {
      operand_tensor_ = empty_on_huge_pages(z.sizes(), dtype);
      operand_ = stack_output(operand_tensor_);
    }
  }

  LinearLayer operator[](int64_t t) const {
    const at::Tensor& z = z_.tensor;
    return {z.size(-2),          z.size(-1), weight_.tensor.size(-2), preactivation_, options_[t],
            z_.stack.layer(t),   narrow_,    operand_.layer(t),       operand_dtype_, weight_.stack.layer(t),
            bias_.stack.layer(t)};
  }

 private:
  StackInput z_;
  bool narrow_;
  StackInput weight_, bias_;
  bool preactivation_;
  std::span<const LayerOptions> options_;
  DType operand_dtype_;
  at::Tensor operand_tensor_;
  Stack operand_;
};

void check_stack(const at::Tensor& z, const at::Tensor& weight, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(z.dim() == 3 || z.dim() == 2, "z: expected shape (T, n, d_in) or (n, d_in), got ", z.sizes());
  TORCH_CHECK_TYPE(z.scalar_type() == dtype, "z: has stacks of dtype ", dtype, " and of ", z.scalar_type());
  TORCH_CHECK_VALUE(
      weight.dim() == z.dim() && weight.size(-1) == z.size(-1) && (z.dim() == 2 || weight.size(0) == z.size(0)),
      "weight: expected shape (", z.dim() == 2 ? "" : "T, ", "d_out, ", z.size(-1), ") for z of shape ", z.sizes(),
      ", got ", weight.sizes());
}

// Raise unless the stacks fit, and every other list has an entry for each.
void check_stacks(
    const TensorList& z, const TensorList& weight,
    std::initializer_list<std::pair<const char*, size_t>> sizes_of_lists) {
  TORCH_CHECK_VALUE(!z.empty(), "z: expected at least 1 stack");
  for (const auto& [name, size] : sizes_of_lists) {
    TORCH_CHECK_VALUE(size == z.size(), name, ": has ", size, " stacks, but z has ", z.size());
  }
  for (size_t i = 0; i < z.size(); ++i) {
    check_stack(z[i], weight[i], z[0].scalar_type());
  }
}

// Of a stack; a tensor without the dimension T is one layer.
int64_t count_layers(const at::Tensor& z) {
  return z.dim() == 2 ? 1 : z.size(0);
}

int64_t count_layers(const TensorList& stacks) {
  int64_t count = 0;
  for (const at::Tensor& z : stacks) {
    count += count_layers(z);
  }
  return count;
}

Shape shape_of_outputs(const at::Tensor& z, const at::Tensor& weight) {
  Shape shape = z.sizes().vec();
  shape.back() = weight.size(-2);
  return shape;
}

// Outputs of one kind, an entry for each stack.
struct Outputs {
  TensorList tensors;
  Stack last; // the entry that was added last

  void add(bool needed, at::IntArrayRef shape, const at::Tensor& like) {
    tensors.push_back(needed ? empty_on_huge_pages(shape, like.scalar_type()) : empty(like));
    last = stack_output(tensors.back(), needed);
  }
};

// What only some of the outputs need: it may be anything where none of them is wanted.
OptionalTensor if_needed(bool needed, const at::Tensor& tensor) {
  return needed ? OptionalTensor(tensor) : std::nullopt;
}

} // namespace

std::tuple<at::Tensor, TensorList, TensorList, TensorList> decoupled_linear(
    const TensorList& z, const TensorList& weight, const OptionalTensorList& bias, const TensorList& target,
    const OptionalTensorList& multiplier, const std::vector<int64_t>& activation, bool preactivation,
    int64_t hidden_loss, double kappa, const std::vector<double>& rho, const std::vector<double>& skip,
    const std::vector<double>& branch_scale, const std::vector<double>& dual_step,
    const std::vector<bool>& need_residual, const std::vector<bool>& need_gradient) {
  check_stacks(
      z, weight,
      {{"weight", weight.size()},
       {"bias", bias.size()},
       {"target", target.size()},
       {"multiplier", multiplier.size()},
       {"need_residual", need_residual.size()},
       {"need_gradient", need_gradient.size()}});
  const std::vector<LayerOptions> options =
      layer_options(count_layers(z), activation, rho, skip, branch_scale, dual_step);

  const auto call = [&](auto io) {
    using Acc = std::remove_pointer_t<decltype(io.energy)>;
    struct Inputs {
      LinearLayers<Acc> linear;
      StackInput target, multiplier;
    };
    std::vector<Inputs> inputs; // alive until the kernel is done
    std::vector<DecoupledLinearLayer> layers;
    Outputs residual, delta, q;
    int64_t n_tiles = 0;
    for (size_t i = 0; i < z.size(); ++i) {
      const Shape shape = shape_of_outputs(z[i], weight[i]);
      const int64_t n_layers = count_layers(z[i]);
      const auto of_stack = std::span(options).subspan(layers.size(), n_layers);
      const Inputs& of = inputs.emplace_back(
          LinearLayers<Acc>(z[i], weight[i], bias[i], preactivation, of_stack, true),
          StackInput(target[i], shape, "target"), StackInput(multiplier[i], shape, "multiplier"));
      residual.add(need_residual[i], shape, z[i]);
      delta.add(need_gradient[i], shape, z[i]);
      q.add(need_gradient[i], shape, z[i]);
      for (int64_t t = 0; t < n_layers; ++t) {
        DecoupledLinearLayer& layer = layers.emplace_back();
        layer.linear = of.linear[t];
        layer.io = {of.target.stack.layer(t), of.multiplier.stack.layer(t), layer.linear.z, {},
                    residual.last.layer(t),   delta.last.layer(t),          q.last.layer(t)};
        n_tiles += energy_tiles(layer.linear.n_samples, layer.linear.d_out);
      }
    }
    const at::Tensor energy =
        at::empty({static_cast<int64_t>(layers.size())}, z[0].options().dtype(c10::CppTypeToScalarType<Acc>::value));
    const at::Tensor tile_energy = at::empty({n_tiles}, at::kDouble);
    double* next = tile_energy.data_ptr<double>();
    for (DecoupledLinearLayer& layer : layers) {
      layer.tile_energy = next;
      next += energy_tiles(layer.linear.n_samples, layer.linear.d_out);
    }
    io.layers = layers.data();
    io.n_layers = layers.size();
    io.hidden_loss = {hidden_loss, kappa};
    io.energy = energy.template data_ptr<Acc>();
    LGD_FOR_THIS_CPU(decoupled_linear, (io))
    return std::make_tuple(energy, residual.tensors, delta.tensors, q.tensors);
  };
  return z[0].scalar_type() == at::kDouble ? call(DecoupledLinear<double>{}) : call(DecoupledLinear<float>{});
}

std::tuple<TensorList, TensorList, TensorList, TensorList, TensorList> decoupled_linear_backward(
    const TensorList& z, const TensorList& weight, const TensorList& e, const TensorList& delta, const TensorList& q,
    const OptionalTensor& grad_energy, const std::vector<int64_t>& activation, bool preactivation,
    const std::vector<double>& skip, const std::vector<double>& branch_scale, const std::vector<bool>& need_z,
    const std::vector<bool>& need_weight, const std::vector<bool>& need_bias, const std::vector<bool>& need_target,
    const std::vector<bool>& need_multiplier) {
  check_stacks(
      z, weight,
      {{"weight", weight.size()},
       {"e", e.size()},
       {"delta", delta.size()},
       {"q", q.size()},
       {"need_z", need_z.size()},
       {"need_weight", need_weight.size()},
       {"need_bias", need_bias.size()},
       {"need_target", need_target.size()},
       {"need_multiplier", need_multiplier.size()}});
  const int64_t n_layers = count_layers(z);
  const std::vector<LayerOptions> options = layer_options(n_layers, activation, {}, skip, branch_scale, {});
  TORCH_CHECK_VALUE(
      !grad_energy || (grad_energy->dim() == 1 && grad_energy->size(0) == n_layers), "grad_energy: expected shape (",
      n_layers, "), got ", grad_energy->sizes());
  const at::Tensor upstream = grad_energy ? grad_energy->to(at::kDouble).contiguous() : at::Tensor();

  const auto call = [&](auto io, auto zero) {
    using Acc = decltype(zero);
    struct Inputs {
      LinearLayers<Acc> linear;
      StackInput e, delta, q;
    };
    std::vector<Inputs> inputs; // alive until the kernel is done
    std::vector<DecoupledLinearBackwardLayer> layers;
    Outputs grad_z, grad_weight, grad_bias, grad_target, grad_multiplier;
    for (size_t i = 0; i < z.size(); ++i) {
      const Shape shape = shape_of_outputs(z[i], weight[i]);
      const int64_t first = layers.size(), count = count_layers(z[i]);
      const auto of_stack = std::span(options).subspan(first, count);
      const bool need_delta = need_z[i] || need_weight[i] || need_bias[i], need_q = need_z[i] || need_target[i];
      // as an operand of products with the weight, delta is rounded like it
      const OptionalTensor operand = if_needed(need_delta, delta[i].to(weight[i].scalar_type()));
      const Inputs& of = inputs.emplace_back(
          LinearLayers<Acc>(z[i], weight[i], std::nullopt, preactivation, of_stack, need_weight[i]),
          StackInput(if_needed(need_multiplier[i], e[i]), shape, "e"), StackInput(operand, shape, "delta"),
          StackInput(if_needed(need_q, q[i]), shape, "q"));
      grad_z.add(need_z[i], z[i].sizes(), z[i]);
      grad_weight.add(need_weight[i], weight[i].sizes(), weight[i]);
      grad_bias.add(need_bias[i], weight[i].sizes().slice(0, weight[i].dim() - 1), weight[i]);
      grad_target.add(need_target[i], shape, z[i]);
      grad_multiplier.add(need_multiplier[i], shape, z[i]);
      if (need_bias[i] && delta[i].scalar_type() != weight[i].scalar_type()) {
        // the kernel sees delta rounded, for the products only
        const at::Tensor sums = accumulated<Acc>(delta[i]).sum(-2).view({count, shape.back()});
        const at::Tensor scaled = grad_energy ? sums.mul(grad_energy->narrow(0, first, count).unsqueeze(1)) : sums;
        grad_bias.tensors[i].copy_(scaled.view_as(grad_bias.tensors[i]));
        grad_bias.last = {};
      }
      for (int64_t t = 0; t < count; ++t) {
        layers.push_back(
            {of.linear[t], of.e.stack.layer(t), of.delta.stack.layer(t), of.q.stack.layer(t),
             grad_energy ? upstream.const_data_ptr<double>()[first + t] : 1.0, grad_z.last.layer(t),
             grad_weight.last.layer(t), grad_bias.last.layer(t), grad_target.last.layer(t),
             grad_multiplier.last.layer(t)});
      }
    }
    io.layers = layers.data();
    io.n_layers = n_layers;
    LGD_FOR_THIS_CPU(decoupled_linear_backward, (io))
    return std::make_tuple(
        grad_z.tensors, grad_weight.tensors, grad_bias.tensors, grad_target.tensors, grad_multiplier.tensors);
  };
  return z[0].scalar_type() == at::kDouble ? call(DecoupledLinearBackward<double>{}, 0.0)
                                           : call(DecoupledLinearBackward<float>{}, 0.0f);
}

} // namespace lgd
