// decoupled_linear on the CPU.
#pragma once

#include <algorithm>

#include "../cpu/decoupled_linear.h"
#include "decoupled_linear_glue.h"
#include "huge_pages.h"

namespace lgd {

// The tensor in the accumulation type; where it is not wider, itself.
template <typename Acc>
at::Tensor accumulated(const at::Tensor& tensor) {
  return tensor.to(c10::CppTypeToScalarType<Acc>::value);
}

template <typename A>
struct LinearOnCpu {
  using Acc = A;
  using Layer = DecoupledLinearLayer;

  // The layers of a stack as the kernels read them, with the tensors that they point to.
  class LinearLayers {
   public:
    LinearLayers(
        const at::Tensor& z, const at::Tensor& weight, const OptionalTensor& bias, bool preactivation,
        std::span<const LayerOptions> options, bool need_operand = true)
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

  static void run(const LinearForward& a, std::vector<Layer>& layers, const at::Tensor& energy) {
    int64_t n_tiles = 0;
    for (const Layer& layer : layers) {
      n_tiles += energy_tiles(layer.linear.n_samples, layer.linear.d_out);
    }
    const at::Tensor tile_energy = at::empty({n_tiles}, at::kDouble);
    double* next = tile_energy.data_ptr<double>();
    for (Layer& layer : layers) {
      layer.tile_energy = next;
      next += energy_tiles(layer.linear.n_samples, layer.linear.d_out);
    }
    DecoupledLinear<Acc> io;
    io.layers = layers.data();
    io.n_layers = layers.size();
    io.hidden_loss = a.hidden_loss;
    io.energy = energy.data_ptr<Acc>();
    LGD_FOR_THIS_CPU(decoupled_linear, (io))
  }

  static LinearGradients backward(const LinearBackward& a) {
    const at::Tensor upstream = a.grad_energy ? a.grad_energy->to(at::kDouble).contiguous() : at::Tensor();
    struct Inputs {
      LinearLayers linear;
      StackInput e, delta, q;
    };
    std::vector<Inputs> inputs; // alive until the kernel is done
    std::vector<DecoupledLinearBackwardLayer> layers;
    Outputs grad_z, grad_weight, grad_bias, grad_target, grad_multiplier;
    for (size_t i = 0; i < a.z.size(); ++i) {
      const Shape shape = shape_of_outputs(a.z[i], a.weight[i]);
      const int64_t first = layers.size(), count = count_layers(a.z[i]);
      const auto of_stack = std::span(a.options).subspan(first, count);
      const bool need_delta = a.need_z[i] || a.need_weight[i] || a.need_bias[i],
                 need_q = a.need_z[i] || a.need_target[i];
      // as an operand of products with the weight, delta is rounded like it
      const OptionalTensor operand = if_needed(need_delta, a.delta[i].to(a.weight[i].scalar_type()));
      const Inputs& of = inputs.emplace_back(
          LinearLayers(a.z[i], a.weight[i], std::nullopt, a.preactivation, of_stack, a.need_weight[i]),
          StackInput(if_needed(a.need_multiplier[i], a.e[i]), shape, "e"), StackInput(operand, shape, "delta"),
          StackInput(if_needed(need_q, a.q[i]), shape, "q"));
      grad_z.add(a.need_z[i], a.z[i].sizes(), a.z[i]);
      grad_weight.add(a.need_weight[i], a.weight[i].sizes(), a.weight[i]);
      grad_bias.add(a.need_bias[i], a.weight[i].sizes().slice(0, a.weight[i].dim() - 1), a.weight[i]);
      grad_target.add(a.need_target[i], shape, a.z[i]);
      grad_multiplier.add(a.need_multiplier[i], shape, a.z[i]);
      if (a.need_bias[i] && a.delta[i].scalar_type() != a.weight[i].scalar_type()) {
        // the kernel sees delta rounded, for the products only
        const at::Tensor sums = accumulated<Acc>(a.delta[i]).sum(-2).view({count, shape.back()});
        const at::Tensor scaled = a.grad_energy ? sums.mul(a.grad_energy->narrow(0, first, count).unsqueeze(1)) : sums;
        grad_bias.tensors[i].copy_(scaled.view_as(grad_bias.tensors[i]));
        grad_bias.last = {};
      }
      for (int64_t t = 0; t < count; ++t) {
        layers.push_back(
            {of.linear[t], of.e.stack.layer(t), of.delta.stack.layer(t), of.q.stack.layer(t),
             a.grad_energy ? upstream.const_data_ptr<double>()[first + t] : 1.0, grad_z.last.layer(t),
             grad_weight.last.layer(t), grad_bias.last.layer(t), grad_target.last.layer(t),
             grad_multiplier.last.layer(t)});
      }
    }
    DecoupledLinearBackward<Acc> io;
    io.layers = layers.data();
    io.n_layers = layers.size();
    LGD_FOR_THIS_CPU(decoupled_linear_backward, (io))
    return {grad_z.tensors, grad_weight.tensors, grad_bias.tensors, grad_target.tensors, grad_multiplier.tensors};
  }
};

} // namespace lgd
