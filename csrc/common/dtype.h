// The element types that cross the border between tensors and kernels.
#pragma once

#include <cstdint>

namespace lgd {

enum class DType : int8_t { Float64, Float32, BFloat16, Float16 };

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : 2;
}

} // namespace lgd
