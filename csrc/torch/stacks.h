// Stacks of layers between tensors and kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../common/layers.h"
#include "common.h"

namespace lgd {

// A tensor (T, n, d) with its last dimension contiguous; strides count elements. Absent when `data` is null. n may be
// missing, for vectors, and so may T, for one layer.
struct Stack {
  void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t layer_stride = 0, row_stride = 0;

  Matrix layer(int64_t t) const;
};

// Such a tensor as the kernels read it, which keeps it alive: itself where its rows are contiguous, else a copy.
struct StackInput {
  Stack stack;
  at::Tensor tensor;

  StackInput() = default;
  StackInput(const OptionalTensor& given, at::IntArrayRef shape, const char* name);
};

// The same for a tensor to be written, made by the caller; absent if it is not wanted.
Stack stack_output(const at::Tensor& tensor, bool wanted = true);

// An uninitialized contiguous output on the device and in the dtype of `like`.
at::Tensor empty_stack(at::IntArrayRef shape, const at::Tensor& like);

// What an output that is not wanted is: no elements, with the dtype of `like`.
at::Tensor empty(const at::Tensor& like);

// Raises unless a tensor is on the device of another and has its dtype, which the kernels for CUDA need.
void check_like(const OptionalTensor& tensor, const at::Tensor& other, const char* name, const char* name_of_other);

// Whether the products of a layer whose operands have this dtype run in bfloat16 on this CPU.
bool takes_bfloat16_products(at::ScalarType dtype, int64_t d_in, int64_t d_out);

// One entry for every layer from lists that must have one for each; an empty list stands for the default.
std::vector<LayerOptions> layer_options(
    int64_t n_layers, const std::vector<int64_t>& activation, const std::vector<double>& rho,
    const std::vector<double>& skip, const std::vector<double>& branch_scale, const std::vector<double>& dual_step);

} // namespace lgd
