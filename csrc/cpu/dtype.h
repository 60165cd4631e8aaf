// The element types that cross the border between tensors and kernels.
#pragma once

#include <cstdint>

namespace lgd {

enum class DType : int8_t { Float64, Float32, BFloat16, Float16 };

} // namespace lgd
