// decoupled_linear between tensors and kernels.

#include "decoupled_linear.h"

#include <ATen/Functions.h>

#include <algorithm>

#include "../cpu/decoupled_linear.h"
#include "huge_pages.h"
#include "stacks.h"

namespace lgd {
namespace {

// The tensor in the accumulation type; where it is not wider, itself.
template <typename Acc>
at::Tensor accumulated(const at::Tensor& tensor) {
  return tensor.to(c10::CppTypeToScalarType<Acc>::value);
}

// LinearLayers with the tensors that they point to.
template <typename Acc>
class Layers {
 public:
  LinearLayers<Acc> view;

  Layers(const at::Tensor& z, const at::Tensor& weight, bool preactivation, const std::vector<LayerOptions>& options)
      : z_(z, z.sizes(), "z"), weight_(accumulated<Acc>(weight), weight.sizes(), "weight") {
    view.n_layers = z.size(0);
    view.n_samples = z.size(1);
    view.d_in = z.size(2);
    view.d_out = weight.size(1);
    view.preactivation = preactivation;
    view.options = options.data();
    view.z = z_.stack;
    view.weight = weight_.stack;
    const bool is_z =
        z.scalar_type() == c10::CppTypeToScalarType<Acc>::value && weight.scalar_type() == z.scalar_type() &&
        (!preactivation || std::all_of(options.begin(), options.end(), [](auto& o) { return o.activation == 0; }));
    if (is_z) {
      view.operand = view.z;
      return;
    }
    operand_ = empty_on_huge_pages(z.sizes(), c10::CppTypeToScalarType<Acc>::value);
    view.operand = stack_output(operand_);
    LinearOperand<Acc> io{view, dtype_of_tensor(weight, "weight")};
    LGD_FOR_THIS_CPU(fill_operand, (io))
  }

 private:
  StackInput z_, weight_;
  at::Tensor operand_;
};

void check_shapes(const at::Tensor& z, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(z.dim() == 3, "z: expected shape (T, n, d_in), got ", z.sizes());
  TORCH_CHECK_VALUE(
      weight.dim() == 3 && weight.size(0) == z.size(0) && weight.size(2) == z.size(2), "weight: expected shape (",
      z.size(0), ", d_out, ", z.size(2), ") for z of shape ", z.sizes(), ", got ", weight.sizes());
}

} // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> decoupled_linear(
    const at::Tensor& z, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& target,
    const OptionalTensor& multiplier, const std::vector<int64_t>& activation, bool preactivation, int64_t hidden_loss,
    double kappa, const std::vector<double>& rho, const std::vector<double>& skip,
    const std::vector<double>& branch_scale, const std::vector<double>& dual_step, bool need_residual,
    bool need_gradient) {
  check_shapes(z, weight);
  const std::vector<LayerOptions> options = layer_options(z.size(0), activation, rho, skip, branch_scale, dual_step);
  const std::vector<int64_t> shape = {z.size(0), z.size(1), weight.size(1)};
  const StackInput of_target(target, shape, "target"), of_multiplier(multiplier, shape, "multiplier");

  const auto call = [&](auto io) {
    using Acc = std::remove_pointer_t<decltype(io.energy)>;
    const Layers<Acc> layers(z, weight, preactivation, options);
    const OptionalTensor rows_of_bias = bias ? OptionalTensor(accumulated<Acc>(*bias).unsqueeze(1)) : std::nullopt;
    const StackInput of_bias(rows_of_bias, {shape[0], 1, shape[2]}, "bias");
    const auto made = [&](bool needed) { return needed ? empty_on_huge_pages(shape, z.scalar_type()) : empty(z); };
    const at::Tensor residual = made(need_residual), delta = made(need_gradient), q = made(need_gradient);
    const at::Tensor energy = at::empty({shape[0]}, z.options().dtype(c10::CppTypeToScalarType<Acc>::value));
    const at::Tensor row_energy = at::empty({shape[0], shape[1]}, z.options().dtype(at::kDouble));
    io.layers = layers.view;
    io.hidden_loss = {hidden_loss, kappa};
    io.bias = of_bias.stack;
    io.target = of_target.stack;
    io.multiplier = of_multiplier.stack;
    io.residual = stack_output(residual);
    io.delta = stack_output(delta);
    io.q = stack_output(q);
    io.energy = energy.template data_ptr<Acc>();
    io.row_energy = row_energy.data_ptr<double>();
    LGD_FOR_THIS_CPU(decoupled_linear, (io))
    return std::make_tuple(energy, residual, delta, q);
  };
  return z.scalar_type() == at::kDouble ? call(DecoupledLinear<double>{}) : call(DecoupledLinear<float>{});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> decoupled_linear_backward(
    const at::Tensor& z, const at::Tensor& weight, const at::Tensor& delta, const at::Tensor& q,
    const OptionalTensor& grad_energy, const std::vector<int64_t>& activation, bool preactivation,
    const std::vector<double>& skip, const std::vector<double>& branch_scale, bool need_z, bool need_weight,
    bool need_bias) {
  check_shapes(z, weight);
  const std::vector<LayerOptions> options = layer_options(z.size(0), activation, {}, skip, branch_scale, {});
  const std::vector<int64_t> shape = {z.size(0), z.size(1), weight.size(1)};

  const auto call = [&](auto io) {
    using Acc = std::remove_const_t<std::remove_pointer_t<decltype(io.grad_energy)>>;
    const Layers<Acc> layers(z, weight, preactivation, options);
    // as an operand of products with the weight, delta is rounded like it
    const StackInput of_delta(accumulated<Acc>(delta.to(weight.scalar_type())), shape, "delta");
    const StackInput of_q(q, shape, "q");
    const at::Tensor upstream = grad_energy ? accumulated<Acc>(*grad_energy).contiguous() : at::Tensor();
    const at::Tensor grad_z = need_z ? empty_on_huge_pages(z.sizes(), z.scalar_type()) : empty(z),
                     grad_weight =
                         need_weight ? empty_on_huge_pages(weight.sizes(), weight.scalar_type()) : empty(weight),
                     grad_bias = need_bias ? at::empty({shape[0], shape[2]}, weight.options()) : empty(weight);
    const bool bias_by_kernel = need_bias && delta.scalar_type() == weight.scalar_type();
    if (need_bias && !bias_by_kernel) { // the kernel sees delta rounded, for the products only
      const at::Tensor sums = accumulated<Acc>(delta).sum(1);
      grad_bias.copy_(grad_energy ? sums.mul(upstream.unsqueeze(1)) : sums);
    }
    io.layers = layers.view;
    io.delta = of_delta.stack;
    io.q = of_q.stack;
    io.grad_energy = grad_energy ? upstream.template const_data_ptr<Acc>() : nullptr;
    io.grad_z = stack_output(grad_z);
    io.grad_weight = stack_output(grad_weight);
    io.grad_bias = bias_by_kernel ? stack_output(grad_bias.unsqueeze(1)) : Stack{};
    LGD_FOR_THIS_CPU(decoupled_linear_backward, (io))
    return std::make_tuple(grad_z, grad_weight, grad_bias);
  };
  return z.scalar_type() == at::kDouble ? call(DecoupledLinearBackward<double>{})
                                        : call(DecoupledLinearBackward<float>{});
}

} // namespace lgd
