// Stores that go around the cache, for results larger than it: they save reading each line before it is written.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace lgd {
inline namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
inline void stream_vector(float* p, at::vec::Vectorized<float> v) {
  _mm512_stream_ps(p, v);
}
inline void stream_vector(double* p, at::vec::Vectorized<double> v) {
  _mm512_stream_pd(p, v);
}
#elif defined(CPU_CAPABILITY_AVX2)
inline void stream_vector(float* p, at::vec::Vectorized<float> v) {
  _mm256_stream_ps(p, v);
}
inline void stream_vector(double* p, at::vec::Vectorized<double> v) {
  _mm256_stream_pd(p, v);
}
#else
template <typename T>
inline void stream_vector(T* p, at::vec::Vectorized<T> v) {
  v.store(p);
}
#endif

// What was streamed before is visible to other threads after this.
inline void fence_streams() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

} // namespace CPU_CAPABILITY
} // namespace lgd
