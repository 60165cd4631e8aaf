// The functions of decoupled_linear on tensors, each answered on the device that z is on.

#include "decoupled_linear.h"

#include <initializer_list>
#include <utility>

#include "decoupled_linear_cpu.h"
#ifdef LGD_WITH_CUDA
#include "decoupled_linear_cuda.h"
#endif

namespace lgd {
namespace {

// f(device) for the device of a tensor and the accumulation type Acc.
template <typename Acc, typename F>
auto with_device(const at::Tensor& tensor, const F& f) {
#ifdef LGD_WITH_CUDA
  if (is_on_cuda(tensor)) {
    return f(LinearOnCuda<Acc>{});
  }
#endif
  return f(LinearOnCpu<Acc>{});
}

// The same for z.
template <typename F>
auto on_device_of(const at::Tensor& z, const F& f) {
  return z.scalar_type() == at::kDouble ? with_device<double>(z, f) : with_device<float>(z, f);
}

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

// Raise unless what is skipped has the shape of the outputs: no kernel may read beyond its arguments.
void check_skip(const TensorList& z, const TensorList& weight, const std::vector<LayerOptions>& options) {
  auto of_layer = options.begin();
  for (size_t i = 0; i < z.size(); ++i) {
    const int64_t d_in = z[i].size(-1), d_out = weight[i].size(-2);
    for (int64_t t = 0; t < count_layers(z[i]); ++t, ++of_layer) {
      TORCH_CHECK_VALUE(
          of_layer->skip == 0 || d_in == d_out, "skip: is ", of_layer->skip, " for layer ", of_layer - options.begin(),
          ", which needs d_in == d_out, got ", d_in, " and ", d_out);
    }
  }
}

int64_t count_all_layers(const TensorList& stacks) {
  int64_t count = 0;
  for (const at::Tensor& z : stacks) {
    count += count_layers(z);
  }
  return count;
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
  const LinearForward arguments{
      z,
      weight,
      bias,
      target,
      multiplier,
      layer_options(count_all_layers(z), activation, rho, skip, branch_scale, dual_step),
      preactivation,
      {hidden_loss, kappa},
      need_residual,
      need_gradient};
  check_skip(z, weight, arguments.options);
  return on_device_of(z[0], [&]<typename Device>(Device) { return linear_forward<Device>(arguments); });
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
  const int64_t n_layers = count_all_layers(z);
  TORCH_CHECK_VALUE(
      !grad_energy || (grad_energy->dim() == 1 && grad_energy->size(0) == n_layers), "grad_energy: expected shape (",
      n_layers, "), got ", grad_energy->sizes());
  const LinearBackward arguments{
      z,
      weight,
      e,
      delta,
      q,
      grad_energy,
      layer_options(n_layers, activation, {}, skip, branch_scale, {}),
      preactivation,
      need_z,
      need_weight,
      need_bias,
      need_target,
      need_multiplier};
  check_skip(z, weight, arguments.options);
  return on_device_of(z[0], [&](auto device) { return device.backward(arguments); });
}

} // namespace lgd
