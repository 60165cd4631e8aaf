// decoupled_linear on a CUDA device, for small widths: nothing here waits for it.
#pragma once

#include <ATen/Context.h>
#include <ATen/ops/mul.h>

#include <algorithm>

#include "../cuda/decoupled_linear.h"
#include "cuda_device.h"
#include "decoupled_linear_glue.h"

namespace lgd {

template <typename A>
struct LinearOnCuda {
  using Acc = A;
  using Layer = gpu::DecoupledLinearLayer;

  // The layers of a stack as the kernels read them, with the tensors that they point to.
  class LinearLayers {
   public:
    LinearLayers(
        const at::Tensor& z, const at::Tensor& weight, const OptionalTensor& bias, bool preactivation,
        std::span<const LayerOptions> options)
        : z_(z, z.sizes(), "z"),
          weight_(weight, weight.sizes(), "weight"),
          bias_(bias, weight.sizes().slice(0, weight.dim() - 1), "bias"),
          preactivation_(preactivation),
          options_(options) {
      TORCH_CHECK_VALUE(weight.device() == z.device(), "weight: is on ", weight.device(), ", but z is on ", z.device());
      const at::ScalarType wide = z.scalar_type(), narrow = weight.scalar_type();
      TORCH_CHECK_TYPE(
          wide == narrow || (wide == at::kFloat && (narrow == at::kBFloat16 || narrow == at::kHalf)),
          "weight: has dtype ", narrow, ", which is neither that of z, ", wide, ", nor a narrower one");
      check_like(bias, weight, "bias", "weight");
      TORCH_CHECK_VALUE(
          std::max(weight.size(-1), weight.size(-2)) <= gpu::kMostWidth,
          "weight: these kernels take layers with at most ", gpu::kMostWidth, " inputs and outputs, got ",
          weight.sizes());
    }

    gpu::LinearLayer operator[](int64_t t) const {
      const at::Tensor &z = z_.tensor, &weight = weight_.tensor;
      const int d_in = static_cast<int>(z.size(-1)), d_out = static_cast<int>(weight.size(-2));
      return {z.size(-2),          d_in, d_out, preactivation_, options_[t], z_.stack.layer(t), weight_.stack.layer(t),
              bias_.stack.layer(t)};
    }

   private:
    StackInput z_, weight_, bias_;
    bool preactivation_;
    std::span<const LayerOptions> options_;
  };

  static void run(const LinearForward& a, const std::vector<Layer>& layers, const at::Tensor& energy) {
    for (size_t i = 0; i < a.z.size(); ++i) {
      check_like(a.target[i], a.z[i], "target", "z");
      check_like(a.multiplier[i], a.z[i], "multiplier", "z");
    }
    gpu::DecoupledLinear<Acc> io;
    io.layers = layers.data();
    io.n_layers = layers.size();
    io.hidden_loss = a.hidden_loss;
    io.tf32 = may_round_float32();
    const CudaLaunch launch(energy);
    const at::Tensor tile_energy = at::empty({gpu::count_tile_energies(io)}, energy.options().dtype(at::kDouble));
    io.energy = energy.data_ptr<Acc>();
    io.tile_energy = tile_energy.data_ptr<double>();
    check_launch(gpu::decoupled_linear(io, launch.stream()), "decoupled_linear");
  }

  static LinearGradients backward(const LinearBackward& a) {
    struct Inputs {
      LinearLayers linear;
      StackInput delta, q;
    };
    std::vector<Inputs> inputs; // alive until the kernel is started
    std::vector<gpu::DecoupledLinearBackwardLayer<Acc>> layers;
    Outputs grad_z, grad_weight, grad_bias;
    TensorList grad_target, grad_multiplier;
    const auto options = a.z[0].options().dtype(c10::CppTypeToScalarType<Acc>::value);
    const OptionalTensor upstream =
        a.grad_energy ? OptionalTensor(a.grad_energy->to(options).contiguous()) : std::nullopt;
    int64_t first = 0; // of the stack's layers
    for (size_t i = 0; i < a.z.size(); ++i) {
      const at::Tensor &z = a.z[i], &weight = a.weight[i];
      const Shape shape = shape_of_outputs(z, weight);
      const int64_t count = count_layers(z);
      const bool need_delta = a.need_z[i] || a.need_weight[i] || a.need_bias[i];
      const OptionalTensor delta = if_needed(need_delta, a.delta[i]), q = if_needed(a.need_z[i], a.q[i]);
      check_like(delta, z, "delta", "z");
      check_like(q, z, "q", "z");
      const Inputs& of = inputs.emplace_back(
          LinearLayers(z, weight, std::nullopt, a.preactivation, std::span(a.options).subspan(first, count)),
          StackInput(delta, shape, "delta"), StackInput(q, shape, "q"));
      grad_z.add(a.need_z[i], z.sizes(), z);
      grad_weight.add(a.need_weight[i], weight.sizes(), weight);
      grad_bias.add(a.need_bias[i], weight.sizes().slice(0, weight.dim() - 1), weight);
      for (int64_t t = 0; t < count && need_delta; ++t) {
        const Acc* factor = upstream ? upstream->const_data_ptr<Acc>() + first + t : nullptr;
        layers.push_back(
            {of.linear[t], of.delta.stack.layer(t), of.q.stack.layer(t), factor, grad_z.last.layer(t),
             grad_weight.last.layer(t), grad_bias.last.layer(t)});
      }
      const OptionalTensor factors = upstream ? OptionalTensor(upstream->narrow(0, first, count)) : std::nullopt;
      grad_target.push_back(scaled(a.need_target[i], a.q[i], factors, shape, z));
      grad_multiplier.push_back(scaled(a.need_multiplier[i], a.e[i], factors, shape, z));
      first += count;
    }
    run_backward(layers, options);
    return {grad_z.tensors, grad_weight.tensors, grad_bias.tensors, grad_target, grad_multiplier};
  }

 private:
  static void run_backward(
      const std::vector<gpu::DecoupledLinearBackwardLayer<Acc>>& layers, const at::TensorOptions& options) {
    gpu::DecoupledLinearBackward<Acc> io;
    io.layers = layers.data();
    io.n_layers = layers.size();
    io.tf32 = may_round_float32();
    const at::Tensor parts = at::empty({gpu::count_parts(io)}, options);
    const CudaLaunch launch(parts);
    io.parts = parts.data_ptr<Acc>();
    check_launch(gpu::decoupled_linear_backward(io, launch.stream()), "decoupled_linear_backward");
  }

  // A new contiguous stack: what was made forward, times the factor of every layer.
  static at::Tensor scaled(
      bool needed, const at::Tensor& stack, const OptionalTensor& factors, const Shape& shape, const at::Tensor& z) {
    if (!needed) {
      return empty(z);
    }
    TORCH_CHECK_VALUE(stack.sizes() == shape, "q or e: expected shape ", shape, ", got ", stack.sizes());
    const at::Tensor result = empty_stack(shape, z);
    result.copy_(factors ? stack.mul(stack.dim() == 2 ? *factors : factors->view({-1, 1, 1})) : stack);
    return result;
  }

  static bool may_round_float32() { // torch.backends.cuda.matmul.fp32_precision
    return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
           at::Float32Precision::TF32;
  }
};

} // namespace lgd
