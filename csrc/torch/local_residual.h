// local_residual on tensors; see lgd_kernels/reference/local_residual.py for what it computes.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "common.h"

namespace lgd {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> local_residual(
    const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& multiplier,
    const OptionalTensor& skip_input, const std::vector<int64_t>& activation, int64_t hidden_loss, double kappa,
    const std::vector<double>& rho, const std::vector<double>& skip, const std::vector<double>& dual_step,
    bool need_residual, bool need_gradient);

} // namespace lgd
