// What the glue of every op needs: tensors in, raw pointers out. Nothing here is compiled for a newer instruction set.
#pragma once

#include <ATen/core/Tensor.h>
#include <optional>
#include <vector>

#include "../common/dtype.h"

namespace lgd {

using OptionalTensor = std::optional<at::Tensor>;
using TensorList = std::vector<at::Tensor>;
using OptionalTensorList = std::vector<OptionalTensor>;

inline DType dtype_of_tensor(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::Float64;
    case at::kFloat:
      return DType::Float32;
    case at::kBFloat16:
      return DType::BFloat16;
    case at::kHalf:
      return DType::Float16;
    default:
      TORCH_CHECK_TYPE(
          false, name, ": dtype must be float64, float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

inline void check_device(const at::Tensor& tensor, at::Device device, const char* name) {
  TORCH_CHECK_VALUE(tensor.device() == device, name, ": is on ", tensor.device(), ", but logits are on ", device);
}

// The instruction set that torch itself uses on this machine; the environment variable ATEN_CPU_CAPABILITY lowers it.
enum class CpuCapability { Default, AVX2, AVX512 };
CpuCapability cpu_capability();
const char* name_of(CpuCapability capability);

// Call `kernel` with the `arguments` in parentheses, in the namespace of this machine's instruction set.
#define LGD_FOR_THIS_CPU(kernel, arguments) \
  switch (::lgd::cpu_capability()) {        \
    case ::lgd::CpuCapability::AVX512:      \
      AVX512::kernel arguments;             \
      break;                                \
    case ::lgd::CpuCapability::AVX2:        \
      AVX2::kernel arguments;               \
      break;                                \
    case ::lgd::CpuCapability::Default:     \
      DEFAULT::kernel arguments;            \
      break;                                \
  }

} // namespace lgd
