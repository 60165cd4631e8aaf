// Tensors as the kernels of every device see them: raw pointers and strides.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace lgd {

// A tensor (O, C, I): `data` is element [0, 0, 0], strides count elements.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::Float32;
  int64_t outer_stride = 0, class_stride = 0, inner_stride = 0;
};

// A per-row tensor (O, I). Absent when `data` is null.
template <typename T>
struct PerRow {
  T* data = nullptr;
  int64_t outer_stride = 0, inner_stride = 0;

  constexpr T& at(int64_t outer, int64_t inner) const { return data[outer * outer_stride + inner * inner_stride]; }
};

} // namespace lgd
