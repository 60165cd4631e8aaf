// decoupled_step_ on tensors; see lgd_kernels/reference/decoupled_step.py for what it computes.
#pragma once

#include <cstdint>
#include <vector>

#include "common.h"
#include "infogain.h"

namespace lgd {

// The lists of stacks, and what is given once for all layers.
struct DecoupledStepArguments {
  at::Tensor x; // (n, d_0)
  TensorList z, multiplier, velocity, residual;
  TensorList weight, weight_first, weight_second;
  TensorList bias, bias_first, bias_second;
  at::Tensor target; // (n,) int64 labels, or (n, d_T) for squared_error
  InfogainTensors h;
  int64_t ignore_index;
  bool squared_error;
  std::vector<int64_t> activation;
  bool preactivation;
  int64_t hidden_loss;
  double kappa;
  std::vector<double> rho, skip, branch_scale;
  int64_t steps;
  double step_size, z_momentum, dual_step;
  int64_t update_rule;
  at::Tensor update_numbers; // (stacks of weight and of bias, 7) float64
};

// The energies (T,).
at::Tensor decoupled_step_(const DecoupledStepArguments& a);

} // namespace lgd
