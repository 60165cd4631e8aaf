// local_residual between tensors and kernels.

#include "local_residual.h"

#include <ATen/ops/empty.h>

#include <initializer_list>
#include <utility>

#include "../cpu/local_residual.h"
#include "stacks.h"
#ifdef LGD_WITH_CUDA
#include "../cuda/local_residual.h"
#include "cuda_device.h"
#endif

namespace lgd {
namespace {

at::Tensor empty_doubles(int64_t count, const at::Tensor& like) {
  return at::empty({count}, like.options().dtype(at::kDouble));
}

// others: the inputs besides the logits.
template <typename Acc>
void run(
    LocalResidual<Acc> io, const at::Tensor& logits,
    std::initializer_list<std::pair<const char*, OptionalTensor>> others) {
#ifdef LGD_WITH_CUDA
  if (is_on_cuda(logits)) {
    for (const auto& [name, tensor] : others) {
      check_like(tensor, logits, name, "logits");
    }
    const CudaLaunch launch(logits);
    const at::Tensor tile_energy = empty_doubles(gpu::count_tile_energies(io), logits);
    io.tile_energy = tile_energy.data_ptr<double>();
    check_launch(gpu::local_residual(io, launch.stream()), "local_residual");
    return;
  }
#endif
  const at::Tensor tile_energy = empty_doubles(io.n_layers * logits.size(1), logits);
  io.tile_energy = tile_energy.data_ptr<double>();
  LGD_FOR_THIS_CPU(local_residual, (io))
}

} // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> local_residual(
    const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& multiplier,
    const OptionalTensor& skip_input, const std::vector<int64_t>& activation, int64_t hidden_loss, double kappa,
    const std::vector<double>& rho, const std::vector<double>& skip, const std::vector<double>& dual_step,
    bool need_residual, bool need_gradient) {
  TORCH_CHECK_VALUE(logits.dim() == 3, "logits: expected shape (T, n, d), got ", logits.sizes());
  const int64_t n_layers = logits.size(0);
  const std::vector<LayerOptions> options = layer_options(n_layers, activation, rho, skip, {}, dual_step);
  const StackInput of_logits(logits, logits.sizes(), "logits"), of_target(target, logits.sizes(), "target"),
      of_multiplier(multiplier, logits.sizes(), "multiplier"), of_skip(skip_input, logits.sizes(), "skip_input");
  for (const LayerOptions& o : options) {
    TORCH_CHECK_VALUE(o.skip == 0 || skip_input, "skip_input: is needed where skip is not 0, got skip ", o.skip);
  }
  const auto output = [&](bool needed) { return needed ? empty_stack(logits.sizes(), logits) : empty(logits); };
  const at::Tensor residual = output(need_residual), delta = output(need_gradient), q = output(need_gradient);
  const at::ScalarType acc = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor energy = at::empty({n_layers}, logits.options().dtype(acc));
  const Stack of_residual = stack_output(residual, need_residual), of_delta = stack_output(delta, need_gradient),
              of_q = stack_output(q, need_gradient);
  std::vector<ResidualLayer> layers(n_layers);
  for (int64_t t = 0; t < n_layers; ++t) {
    layers[t].n_samples = logits.size(1);
    layers[t].n_units = logits.size(2);
    layers[t].logits = of_logits.stack.layer(t);
    layers[t].io = {
        of_target.stack.layer(t),
        of_multiplier.stack.layer(t),
        of_skip.stack.layer(t),
        {},
        of_residual.layer(t),
        of_delta.layer(t),
        of_q.layer(t)};
    layers[t].options = options[t];
  }

  const auto call = [&](auto io) {
    io.layers = layers.data();
    io.n_layers = n_layers;
    io.hidden_loss = {hidden_loss, kappa};
    io.energy = energy.data_ptr<std::remove_pointer_t<decltype(io.energy)>>();
    run(io, logits, {{"target", target}, {"multiplier", multiplier}, {"skip_input", skip_input}});
  };
  acc == at::kDouble ? call(LocalResidual<double>{}) : call(LocalResidual<float>{});
  return {energy, residual, delta, q};
}

} // namespace lgd
