// Runs of a stack's rows as contiguous vectors of the accumulation type, and back.
#pragma once

#include <cstdint>

#include "layers.h"
#include "parallel.h"
#include "rows.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

inline ConstRow row_of(const Stack& stack, int64_t layer, int64_t sample) {
  const int64_t offset = layer * stack.layer_stride + sample * stack.row_stride;
  return {static_cast<const char*>(stack.data) + offset * element_size(stack.dtype), stack.dtype, 1};
}

inline Row writable_row_of(const Stack& stack, int64_t layer, int64_t sample) {
  const ConstRow row = row_of(stack, layer, sample);
  return {const_cast<char*>(row.data), row.dtype, 1};
}

// An input row's elements [first, first + count): in place, or converted in a buffer of `slot`. nullptr if absent.
template <typename Acc>
inline const Acc* read_run(
    const Stack& stack, int64_t layer, int64_t sample, int64_t first, int64_t count, Scratch slot) {
  if (stack.data == nullptr) {
    return nullptr;
  }
  Acc* buffer = stack.dtype == dtype_of<Acc>() ? nullptr : scratch_of<Acc>(slot, count);
  return load_row(row_of(stack, layer, sample), first, count, buffer);
}

// Where an output row's elements [first, first + count) are to be put: in place, or in a buffer from which `finish`
// converts them. Null if the output is not wanted.
template <typename Acc>
class OutputRun {
 public:
  OutputRun(const Stack& stack, int64_t layer, int64_t sample, int64_t first, int64_t count, Scratch slot)
      : first_(first), count_(count) {
    if (stack.data == nullptr) {
      return;
    }
    row_ = writable_row_of(stack, layer, sample);
    in_place_ = stack.dtype == dtype_of<Acc>();
    data = in_place_ ? reinterpret_cast<Acc*>(element(row_, first)) : scratch_of<Acc>(slot, count);
  }

  void finish() const {
    if (data != nullptr && !in_place_) {
      store_row(data, row_, first_, count_);
    }
  }

  Acc* data = nullptr;

 private:
  Row row_{};
  int64_t first_, count_;
  bool in_place_ = true;
};

} // namespace CPU_CAPABILITY
} // namespace lgd
