// Threads and scratch memory for the vector code, which is compiled once per instruction set and therefore must not
// instantiate templates or inline functions of other libraries: what it would emit could replace the baseline's copy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lgd {

// body(context, begin, end) for blocks of at least `grain` that cover the range, on the threads of at::parallel_for.
void parallel_for_erased(
    int64_t begin, int64_t end, int64_t grain, void (*body)(const void* context, int64_t begin, int64_t end),
    const void* context);

int num_threads();

// Memory of the calling thread, 64-byte aligned and kept until the thread ends. Each slot is one buffer: asking again
// for the same slot may move it.
enum class Scratch : int {
  Logits,
  Matrix,
  Exponentials,
  Gradient,
  Vector,
  Sums,
  Target,
  Multiplier,
  SkipInput,
  Residual,
  Delta,
  Q,
  LayerDelta,
  EvenQ,
  OddQ,
  Factor,
  Narrow,
  Count
};
void* scratch(Scratch slot, size_t bytes);

inline namespace CPU_CAPABILITY {

template <typename Body>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  parallel_for_erased(
      begin, end, grain, [](const void* context, int64_t b, int64_t e) { (*static_cast<const Body*>(context))(b, e); },
      &body);
}

template <typename T>
inline T* scratch_of(Scratch slot, int64_t count) {
  return static_cast<T*>(scratch(slot, count * sizeof(T)));
}

} // namespace CPU_CAPABILITY
} // namespace lgd
