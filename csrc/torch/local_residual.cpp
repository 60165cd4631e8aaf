// local_residual between tensors and kernels.

#include "local_residual.h"

#include <ATen/Functions.h>

#include "../cpu/local_residual.h"
#include "huge_pages.h"
#include "stacks.h"

namespace lgd {
namespace {

template <typename Acc>
void run(LocalResidual<Acc>& io, const at::Tensor& energy, const at::Tensor& row_energy) {
  io.energy = energy.data_ptr<Acc>();
  io.row_energy = row_energy.data_ptr<double>();
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
  const auto output = [&](bool needed) {
    return needed ? empty_on_huge_pages(logits.sizes(), logits.scalar_type()) : empty(logits);
  };
  const at::Tensor residual = output(need_residual), delta = output(need_gradient), q = output(need_gradient);
  const at::ScalarType acc = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor energy = at::empty({n_layers}, logits.options().dtype(acc));
  const at::Tensor row_energy = at::empty({n_layers, logits.size(1)}, logits.options().dtype(at::kDouble));

  const auto call = [&](auto io) {
    io.n_layers = n_layers;
    io.n_samples = logits.size(1);
    io.n_units = logits.size(2);
    io.logits = of_logits.stack;
    io.target = of_target.stack;
    io.multiplier = of_multiplier.stack;
    io.skip_input = of_skip.stack;
    io.options = options.data();
    io.hidden_loss = {hidden_loss, kappa};
    io.residual = stack_output(residual);
    io.delta = stack_output(delta);
    io.q = stack_output(q);
    run(io, energy, row_energy);
  };
  acc == at::kDouble ? call(LocalResidual<double>{}) : call(LocalResidual<float>{});
  return {energy, residual, delta, q};
}

} // namespace lgd
