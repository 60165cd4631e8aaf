// The functions of softmax_infogain on tensors; see lgd_kernels/reference/softmax_infogain.py for what they compute.
#pragma once

#include <cstdint>
#include <tuple>

#include "common.h"
#include "infogain.h"

namespace lgd {

// The arguments that every function of this op starts with.
struct RowArguments {
  at::Tensor logits; // (O, C, I)
  at::Tensor labels; // (O, I)
  InfogainTensors h;
  int64_t ignore_index;
  double z_loss;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> softmax_infogain(
    const RowArguments& rows, const OptionalTensor& row_scale, bool need_lse, bool need_norm);

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_infogain_reduced(
    const RowArguments& rows, const OptionalTensor& sample_weight, std::optional<double> divisor, bool need_grad);

at::Tensor softmax_infogain_backward(
    const RowArguments& rows, const at::Tensor& grad_loss, const OptionalTensor& grad_lse);

void softmax_infogain_backward_(
    const at::Tensor& grad, const at::Tensor& row_scale, const RowArguments& rows, const at::Tensor& grad_loss,
    const OptionalTensor& grad_lse);

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_infogain_double_backward(
    const RowArguments& rows, const at::Tensor& grad_loss, const OptionalTensor& grad_lse, const at::Tensor& grad_grad);

at::Tensor softmax_infogain_backward_matrix(const RowArguments& rows, int64_t n_rows, const at::Tensor& grad_loss);

at::Tensor count_labels(const at::Tensor& labels, int64_t ignore_index, at::ScalarType dtype);

} // namespace lgd
