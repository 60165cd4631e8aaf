// decoupled_linear on tensors; see lgd_kernels/reference/decoupled_linear.py for what it computes.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "common.h"

namespace lgd {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> decoupled_linear(
    const at::Tensor& z, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& target,
    const OptionalTensor& multiplier, const std::vector<int64_t>& activation, bool preactivation, int64_t hidden_loss,
    double kappa, const std::vector<double>& rho, const std::vector<double>& skip,
    const std::vector<double>& branch_scale, const std::vector<double>& dual_step, bool need_residual,
    bool need_gradient);

std::tuple<at::Tensor, at::Tensor, at::Tensor> decoupled_linear_backward(
    const at::Tensor& z, const at::Tensor& weight, const at::Tensor& delta, const at::Tensor& q,
    const OptionalTensor& grad_energy, const std::vector<int64_t>& activation, bool preactivation,
    const std::vector<double>& skip, const std::vector<double>& branch_scale, bool need_z, bool need_weight,
    bool need_bias);

} // namespace lgd
