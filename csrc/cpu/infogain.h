// The label-similarity matrix H as the kernels see it: a base, and entries that differ from it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "rows.h"
#include "softmax_infogain.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

// What H is outside its diagonal and its stored values.
enum class Base { Zero, Constant, Dense };

// The entries of one row of H that differ from its base, ascending in class.
template <typename Acc>
struct Entries {
  const int64_t* col = nullptr;
  const Acc* value = nullptr;
  int64_t count = 0;
};

// Call f with the base of H as a type: f(std::integral_constant<Base, ...>).
template <typename F>
inline void with_base(const InfogainView& h, const F& f) {
  if (h.matrix != nullptr) {
    f(std::integral_constant<Base, Base::Dense>{});
  } else if (h.background != 0) {
    f(std::integral_constant<Base, Base::Constant>{});
  } else {
    f(std::integral_constant<Base, Base::Zero>{});
  }
}

inline ConstRow dense_row_of_h(const InfogainView& h, int64_t label) {
  const int64_t offset = label * h.matrix_row_stride * element_size(h.matrix_dtype);
  return {static_cast<const char*>(h.matrix) + offset, h.matrix_dtype, h.matrix_class_stride};
}

// The values stored for row `label`.
template <typename Acc>
inline Entries<Acc> stored_values_of_h(const InfogainView& h, int64_t label) {
  const int64_t begin = h.crow[label];
  return {h.col + begin, static_cast<const Acc*>(h.values) + begin, h.crow[label + 1] - begin};
}

// The entries of row `label`; the one entry of a diagonal is (col, diagonal), which live with the caller.
template <typename Acc>
inline Entries<Acc> entries_of_h(const InfogainView& h, int64_t label, const Acc& diagonal, const int64_t& col) {
  if (h.crow != nullptr) {
    return stored_values_of_h<Acc>(h, label);
  }
  return {&col, &diagonal, h.diagonal != nullptr ? 1 : 0};
}

} // namespace CPU_CAPABILITY
} // namespace lgd
