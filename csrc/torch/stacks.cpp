#include "stacks.h"

#include <ATen/ops/empty.h>

#include "../cpu/gemm.h"
#include "huge_pages.h"

namespace lgd {
namespace {

Stack stack_of(const at::Tensor& tensor, const char* name) {
  const int64_t row_stride = tensor.dim() == 1 ? 0 : tensor.stride(-2);
  return {const_cast<void*>(tensor.const_data_ptr()), dtype_of_tensor(tensor, name), tensor.stride(0), row_stride};
}

} // namespace

Matrix Stack::layer(int64_t t) const {
  char* const first = static_cast<char*>(data); // null where there is nothing, or nothing in it
  return {first == nullptr ? first : first + t * layer_stride * element_size(dtype), dtype, row_stride};
}

StackInput::StackInput(const OptionalTensor& given, at::IntArrayRef shape, const char* name) {
  if (!given) {
    return;
  }
  TORCH_CHECK_VALUE(given->sizes() == shape, name, ": expected shape ", shape, ", got ", given->sizes());
  tensor = given->stride(-1) == 1 || given->size(-1) <= 1 ? *given : given->contiguous();
  stack = stack_of(tensor, name);
}

Stack stack_output(const at::Tensor& tensor, bool wanted) {
  return wanted ? stack_of(tensor, "output") : Stack{};
}

at::Tensor empty(const at::Tensor& like) {
  return at::empty({0}, like.options());
}

at::Tensor empty_stack(at::IntArrayRef shape, const at::Tensor& like) {
  return like.is_cpu() ? empty_on_huge_pages(shape, like.scalar_type()) : at::empty(shape, like.options());
}

void check_like(const OptionalTensor& tensor, const at::Tensor& other, const char* name, const char* name_of_other) {
  if (!tensor) {
    return;
  }
  TORCH_CHECK_VALUE(
      tensor->device() == other.device(), name, ": is on ", tensor->device(), ", but ", name_of_other, " is on ",
      other.device());
  TORCH_CHECK_TYPE(
      tensor->scalar_type() == other.scalar_type(), name, ": has dtype ", tensor->scalar_type(), ", but ",
      name_of_other, " has dtype ", other.scalar_type());
}

bool takes_bfloat16_products(at::ScalarType dtype, int64_t d_in, int64_t d_out) {
  return dtype == at::kBFloat16 && d_in % 2 == 0 && d_out % 2 == 0 && multiplies_bfloat16();
}

std::vector<LayerOptions> layer_options(
    int64_t n_layers, const std::vector<int64_t>& activation, const std::vector<double>& rho,
    const std::vector<double>& skip, const std::vector<double>& branch_scale, const std::vector<double>& dual_step) {
  const auto check = [&](const auto& list, const char* name) {
    TORCH_CHECK_VALUE(
        list.empty() || static_cast<int64_t>(list.size()) == n_layers, name, ": has ", list.size(),
        " values, but there are ", n_layers, " layers");
  };
  check(activation, "activation");
  check(rho, "rho");
  check(skip, "skip");
  check(branch_scale, "branch_scale");
  check(dual_step, "dual_step");
  std::vector<LayerOptions> options(n_layers);
  const auto at = [](const auto& list, int64_t t, auto otherwise) { return list.empty() ? otherwise : list[t]; };
  for (int64_t t = 0; t < n_layers; ++t) {
    options[t] = {
        at(activation, t, int64_t(0)), at(rho, t, 1.0), at(skip, t, 0.0), at(branch_scale, t, 1.0),
        at(dual_step, t, 0.0)};
  }
  return options;
}

} // namespace lgd
