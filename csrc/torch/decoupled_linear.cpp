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

// The layers of stacks as the kernels read them, with the tensors that they point to.
template <typename Acc>
class LinearLayers {
 public:
  LinearLayers(
      const at::Tensor& z, const at::Tensor& weight, const OptionalTensor& bias, bool preactivation,
      const std::vector<LayerOptions>& options, bool need_operand)
      : z_(z, z.sizes(), "z"),
        narrow_(takes_bfloat16_products(weight.scalar_type(), weight.size(2), weight.size(1))),
        weight_(narrow_ ? weight : accumulated<Acc>(weight), weight.sizes(), "weight"),
        bias_(
            bias ? OptionalTensor(accumulated<Acc>(*bias).unsqueeze(1)) : std::nullopt,
            {weight.size(0), 1, weight.size(1)}, "bias"),
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
    return {z.size(1),           z.size(2), weight_.tensor.size(1), preactivation_, options_[t],
            z_.stack.layer(t),   narrow_,   operand_.layer(t),      operand_dtype_, weight_.stack.layer(t),
            bias_.stack.layer(t)};
  }

 private:
  StackInput z_;
  bool narrow_;
  StackInput weight_, bias_;
  bool preactivation_;
  const std::vector<LayerOptions>& options_;
  DType operand_dtype_;
  at::Tensor operand_tensor_;
  Stack operand_;
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
    const LinearLayers<Acc> linear(z, weight, bias, preactivation, options, true);
    const auto made = [&](bool needed) { return needed ? empty_on_huge_pages(shape, z.scalar_type()) : empty(z); };
    const at::Tensor residual = made(need_residual), delta = made(need_gradient), q = made(need_gradient);
    const Stack of_residual = stack_output(residual), of_delta = stack_output(delta), of_q = stack_output(q);
    const at::Tensor energy = at::empty({shape[0]}, z.options().dtype(c10::CppTypeToScalarType<Acc>::value));
    const at::Tensor tile_energy = at::empty({shape[0], energy_tiles(shape[1], shape[2])}, at::kDouble);
    std::vector<DecoupledLinearLayer> layers(shape[0]);
    for (int64_t t = 0; t < shape[0]; ++t) {
      layers[t].linear = linear[t];
      layers[t].io = {
          of_target.stack.layer(t),
          of_multiplier.stack.layer(t),
          layers[t].linear.z,
          {},
          of_residual.layer(t),
          of_delta.layer(t),
          of_q.layer(t)};
      layers[t].tile_energy = tile_energy.data_ptr<double>() + t * tile_energy.size(1);
    }
    io.layers = layers.data();
    io.n_layers = shape[0];
    io.hidden_loss = {hidden_loss, kappa};
    io.energy = energy.template data_ptr<Acc>();
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

  const auto call = [&](auto io, auto zero) {
    using Acc = decltype(zero);
    const LinearLayers<Acc> linear(z, weight, std::nullopt, preactivation, options, need_weight);
    // as an operand of products with the weight, delta is rounded like it
    const StackInput of_delta(delta.to(weight.scalar_type()), shape, "delta");
    const StackInput of_q(q, shape, "q");
    const at::Tensor upstream = grad_energy ? grad_energy->to(at::kDouble).contiguous() : at::Tensor();
    const at::Tensor grad_z = need_z ? empty_on_huge_pages(z.sizes(), z.scalar_type()) : empty(z),
                     grad_weight =
                         need_weight ? empty_on_huge_pages(weight.sizes(), weight.scalar_type()) : empty(weight),
                     grad_bias = need_bias ? at::empty({shape[0], shape[2]}, weight.options()) : empty(weight);
    const bool bias_by_kernel = need_bias && delta.scalar_type() == weight.scalar_type();
    if (need_bias && !bias_by_kernel) { // the kernel sees delta rounded, for the products only
      const at::Tensor sums = accumulated<Acc>(delta).sum(1);
      grad_bias.copy_(grad_energy ? sums.mul(grad_energy->unsqueeze(1)) : sums);
    }
    const Stack of_grad_z = stack_output(grad_z), of_grad_weight = stack_output(grad_weight),
                of_grad_bias = bias_by_kernel ? stack_output(grad_bias.unsqueeze(1)) : Stack{};
    std::vector<DecoupledLinearBackwardLayer> layers(shape[0]);
    for (int64_t t = 0; t < shape[0]; ++t) {
      layers[t] = {
          linear[t],
          of_delta.stack.layer(t),
          of_q.stack.layer(t),
          grad_energy ? upstream.const_data_ptr<double>()[t] : 1.0,
          of_grad_z.layer(t),
          of_grad_weight.layer(t),
          of_grad_bias.layer(t)};
    }
    io.layers = layers.data();
    io.n_layers = shape[0];
    LGD_FOR_THIS_CPU(decoupled_linear_backward, (io))
    return std::make_tuple(grad_z, grad_weight, grad_bias);
  };
  return z.scalar_type() == at::kDouble ? call(DecoupledLinearBackward<double>{}, 0.0)
                                        : call(DecoupledLinearBackward<float>{}, 0.0f);
}

} // namespace lgd
