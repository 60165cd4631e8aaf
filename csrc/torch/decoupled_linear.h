// decoupled_linear on tensors; see lgd_kernels/reference/decoupled_linear.py for what it computes.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "common.h"

namespace lgd {

// Energies (T,), e, delta, q.
std::tuple<at::Tensor, TensorList, TensorList, TensorList> decoupled_linear(
    const TensorList& z, const TensorList& weight, const OptionalTensorList& bias, const TensorList& target,
    const OptionalTensorList& multiplier, const std::vector<int64_t>& activation, bool preactivation,
    int64_t hidden_loss, double kappa, const std::vector<double>& rho, const std::vector<double>& skip,
    const std::vector<double>& branch_scale, const std::vector<double>& dual_step,
    const std::vector<bool>& need_residual, const std::vector<bool>& need_gradient);

// The gradients of z, weight, bias, target and multiplier.
std::tuple<TensorList, TensorList, TensorList, TensorList, TensorList> decoupled_linear_backward(
    const TensorList& z, const TensorList& weight, const TensorList& e, const TensorList& delta, const TensorList& q,
    const OptionalTensor& grad_energy, const std::vector<int64_t>& activation, bool preactivation,
    const std::vector<double>& skip, const std::vector<double>& branch_scale, const std::vector<bool>& need_z,
    const std::vector<bool>& need_weight, const std::vector<bool>& need_bias, const std::vector<bool>& need_target,
    const std::vector<bool>& need_multiplier);

} // namespace lgd
