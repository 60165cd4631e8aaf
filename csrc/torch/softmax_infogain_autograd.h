// The reduced loss of plain eager code together with its node in the graph.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "softmax_infogain.h"

namespace lgd {

// What SoftmaxInfogainReduced in lgd_kernels/autograd/softmax_infogain.py does, for ordinary CPU tensors and an H
// without gradient; no value for others. Same arguments: rows.logits of any shape, `shape` (O, C, I).
OptionalTensor softmax_infogain_reduced_with_node(
    const RowArguments& rows, const OptionalTensor& sample_weight, std::optional<double> divisor, bool need_grad,
    const std::vector<int64_t>& shape);

// The whole of softmax_infogain_loss for its usual call: logits (N, C) of ordinary CPU memory, int64 labels (N,), the
// mean over those that are not ignored, all other options left at their defaults. No value for everything else, right
// or wrong. num_classes: what H is for, if that is known.
OptionalTensor softmax_infogain_mean(
    const at::Tensor& logits, const at::Tensor& labels, const InfogainTensors& h, std::optional<int64_t> num_classes,
    int64_t ignore_index);

// `backward` answers for the node whenever the gradient made in advance is not the answer.
void set_backward_of_reduced(pybind11::object backward);

} // namespace lgd
