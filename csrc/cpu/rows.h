// Rows of any dtype and stride as contiguous vectors of the accumulation type, and back.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

#include "../common/dtype.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

using at::vec::Vectorized;

template <typename T>
constexpr DType dtype_of() {
  return std::is_same_v<T, double>          ? DType::Float64
         : std::is_same_v<T, float>         ? DType::Float32
         : std::is_same_v<T, c10::BFloat16> ? DType::BFloat16
                                            : DType::Float16;
}

// Call f(T{}) with the type that dtype names.
template <typename F>
inline void visit_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float64:
      return f(double{});
    case DType::Float32:
      return f(float{});
    case DType::BFloat16:
      return f(c10::BFloat16(0, c10::BFloat16::from_bits()));
    case DType::Float16:
      return f(c10::Half(0, c10::Half::from_bits()));
  }
}

inline auto to_float(Vectorized<c10::BFloat16> v) {
  return at::vec::convert_bfloat16_float(v);
}
inline auto to_float(Vectorized<c10::Half> v) {
  return at::vec::convert_half_float(v);
}

template <typename T>
inline Vectorized<T> from_float(Vectorized<float> low, Vectorized<float> high) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return at::vec::convert_float_bfloat16(low, high);
  } else {
    return at::vec::convert_float_half(low, high);
  }
}

template <typename Acc, typename T>
inline void load_elements(const T* source, int64_t stride, int64_t count, Acc* destination) {
  int64_t i = 0;
  if constexpr (std::is_same_v<Acc, float> && sizeof(T) == 2) {
    constexpr int64_t step = Vectorized<T>::size();
    for (; stride == 1 && i + step <= count; i += step) {
      const auto [low, high] = to_float(Vectorized<T>::loadu(source + i));
      low.store(destination + i);
      high.store(destination + i + Vectorized<float>::size());
    }
  }
  for (; i < count; ++i) {
    destination[i] = static_cast<Acc>(source[i * stride]);
  }
}

template <typename Acc, typename T>
inline void store_elements(const Acc* source, int64_t count, T* destination, int64_t stride) {
  int64_t i = 0;
  if constexpr (std::is_same_v<Acc, float> && sizeof(T) == 2) {
    constexpr int64_t step = Vectorized<T>::size();
    for (; stride == 1 && i + step <= count; i += step) {
      const auto low = Vectorized<float>::loadu(source + i);
      const auto high = Vectorized<float>::loadu(source + i + Vectorized<float>::size());
      from_float<T>(low, high).store(destination + i);
    }
  }
  for (; i < count; ++i) {
    destination[i * stride] = static_cast<T>(source[i]);
  }
}

// A one-dimensional piece of a tensor.
struct ConstRow {
  const char* data; // first element
  DType dtype;
  int64_t stride; // in elements
};

// Elements [begin, begin + count) of the row: in place where they lie as the kernel needs them, else in `buffer`.
template <typename Acc>
inline const Acc* load_row(const ConstRow& row, int64_t begin, int64_t count, Acc* buffer) {
  const char* first = row.data + begin * row.stride * element_size(row.dtype);
  if (row.dtype == dtype_of<Acc>() && row.stride == 1) {
    return reinterpret_cast<const Acc*>(first);
  }
  visit_dtype(row.dtype, [&](auto tag) {
    load_elements(reinterpret_cast<const decltype(tag)*>(first), row.stride, count, buffer);
  });
  return buffer;
}

struct Row {
  char* data;
  DType dtype;
  int64_t stride;
};

inline char* element(const Row& row, int64_t index) {
  return row.data + index * row.stride * element_size(row.dtype);
}

template <typename Acc>
inline void store_row(const Acc* source, const Row& row, int64_t begin, int64_t count) {
  visit_dtype(row.dtype, [&](auto tag) {
    store_elements(source, count, reinterpret_cast<decltype(tag)*>(element(row, begin)), row.stride);
  });
}

template <typename Acc>
inline void store_zeros(const Row& row, int64_t count) {
  constexpr int64_t step = 256;
  const Acc zeros[step] = {};
  for (int64_t begin = 0; begin < count; begin += step) {
    store_row(zeros, row, begin, count - begin < step ? count - begin : step);
  }
}

} // namespace CPU_CAPABILITY
} // namespace lgd
