// Groups: up to W neighbours in a row of a matrix, the elements of 128 bits. A group that is whole and aligned moves as
// one access, others element by element; which elements are a group does not depend on that, so no result does.
#pragma once

#include "elements.cuh"

namespace lgd::gpu {

template <typename T>
LGD_DEVICE bool is_vector(const T* group, int count) {
  return count == kPerVector<T> && reinterpret_cast<uintptr_t>(group) % 16 == 0;
}

// As it lies in memory, with zeros for what is not there; nothing of null.
template <typename T>
LGD_DEVICE Words<4> load_group(const T* source, int count) {
  if (source == nullptr) {
    return {};
  }
  if (is_vector(source, count)) {
    return load<4>(source);
  }
  T elements[kPerVector<T>] = {};
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    if (i < count) {
      elements[i] = source[i];
    }
  }
  return bits_as<Words<4>>(elements);
}

// To where it is wanted.
template <typename T, typename A, int W>
LGD_DEVICE void store_group(T* target, int count, const A (&x)[W]) {
  if (target == nullptr) {
    return;
  }
  if (is_vector(target, count)) {
    store(target, pack<T>(x));
    return;
  }
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if (i < count) {
      target[i] = element_from<T>(x[i]);
    }
  }
}

// A group's place in a matrix.
struct Place {
  int64_t row;
  int64_t column;
  int count;
};

// Of group `number` of a matrix with so many columns, row by row.
template <int W>
LGD_DEVICE Place place_of(int64_t number, int64_t groups_of_row, int64_t columns) {
  const int64_t row = number < groups_of_row ? 0 : number / groups_of_row;
  const int64_t column = (number - row * groups_of_row) * W, left = columns - column;
  return {row, column, left < W ? static_cast<int>(left) : W};
}

} // namespace lgd::gpu
