// Everything in which CUDA differs from plain C++, and nothing else: the only file with PTX or intrinsics. Each
// primitive has a twin for the host, with which tests/cuda_on_host runs the kernels on a CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef LGD_CUDA_ON_HOST
#include "cuda_on_host.h"
#define LGD_DEVICE inline
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LGD_DEVICE __device__ __forceinline__
#endif

namespace lgd::gpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The shape of a launch. A cluster is a number of blocks that can reach each other's shared memory.
struct Grid {
  int64_t blocks = 0;
  int threads_x = 1, threads_y = 1;
  int cluster = 1;
  int64_t shared_bytes = 0;
};

// ---------------------------------------------------------------------------------------------------------------------
// Bits and numbers
// ---------------------------------------------------------------------------------------------------------------------

template <typename To, typename From>
LGD_DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

LGD_DEVICE float to_float(BFloat16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}

#ifdef LGD_CUDA_ON_HOST

LGD_DEVICE float to_float(Float16 x) {
  return static_cast<float>(bits_as<_Float16>(x.bits));
}

// Two numbers rounded to nearest, the first in the lower half.
template <typename T>
LGD_DEVICE uint32_t round_pair(float low, float high) {
  const auto round = [](float x) -> uint32_t {
    if constexpr (std::is_same_v<T, Float16>) {
      return bits_as<uint16_t>(static_cast<_Float16>(x));
    }
    const uint32_t bits = bits_as<uint32_t>(x);
    return std::isnan(x) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  };
  return round(low) | round(high) << 16;
}

LGD_DEVICE float exp2_approximate(float x) {
  return std::exp2(x);
}

#else

LGD_DEVICE float to_float(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

template <typename T>
LGD_DEVICE uint32_t round_pair(float low, float high) {
  if constexpr (std::is_same_v<T, Float16>) {
    return bits_as<uint32_t>(__floats2half2_rn(low, high));
  }
  return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}

// Within 2 units of the last place; what would be subnormal is 0.
LGD_DEVICE float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

#endif

// exp(x) for x <= 0. The product comes after the shift by the row's maximum, which is exact where it matters: with the
// shift in one multiply-add, logits of 1e4 would cost three digits.
LGD_DEVICE float exp_of(float x) {
  return exp2_approximate(x * 1.4426950408889634f);
}
LGD_DEVICE double exp_of(double x) {
  return exp(x);
}
LGD_DEVICE float log_of(float x) {
  return logf(x);
}
LGD_DEVICE double log_of(double x) {
  return log(x);
}
LGD_DEVICE float square_root(float x) {
  return sqrtf(x);
}
LGD_DEVICE double square_root(double x) {
  return sqrt(x);
}
LGD_DEVICE float larger_of(float a, float b) { // of a number and NaN, the number
  return fmaxf(a, b);
}
LGD_DEVICE double larger_of(double a, double b) {
  return fmax(a, b);
}
template <typename A>
LGD_DEVICE bool is_nan(A x) {
  return x != x;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory: N words of 32 bits as one access, or as several of 128 bits; aligned to that
// ---------------------------------------------------------------------------------------------------------------------

template <int N>
struct alignas(N < 4 ? 4 * N : 16) Words {
  uint32_t word[N];
};

template <int N>
LGD_DEVICE Words<N> load(const void* source) {
  return *static_cast<const Words<N>*>(source);
}

#ifdef LGD_CUDA_ON_HOST

LGD_DEVICE Words<4> load_once(const void* source) {
  return load<4>(source);
}
LGD_DEVICE void store_once(void* target, const Words<4>& words) {
  *static_cast<Words<4>*>(target) = words;
}

#else

// What is not read again: it should not push out of the cache what is.
LGD_DEVICE Words<4> load_once(const void* source) {
  const uint4 v = __ldcs(static_cast<const uint4*>(source));
  return {{v.x, v.y, v.z, v.w}};
}
LGD_DEVICE void store_once(void* target, const Words<4>& words) {
  __stcs(static_cast<uint4*>(target), make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]));
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Threads
// ---------------------------------------------------------------------------------------------------------------------

#ifdef LGD_CUDA_ON_HOST

using cuda_on_host::ballot;
using cuda_on_host::block_any;
using cuda_on_host::block_sync;
using cuda_on_host::cluster_pointer;
using cuda_on_host::cluster_rank;
using cuda_on_host::cluster_sync;
using cuda_on_host::lowest_bit;
using cuda_on_host::shared_memory;
using cuda_on_host::shuffle_xor;
using cuda_on_host::warp_sync;

template <auto kernel, typename... Arguments>
int launch(const Grid& grid, void*, const Arguments&... arguments) {
  const cuda_on_host::Launch shape{grid.blocks, grid.threads_x, grid.threads_y, grid.cluster, grid.shared_bytes};
  return cuda_on_host::run(__PRETTY_FUNCTION__, shape, [&] { kernel(arguments...); });
}

#else

// The value of the lane whose number differs in the bits of `offset`. All lanes of the mask have to come.
template <typename A>
LGD_DEVICE A shuffle_xor(unsigned mask, A value, int offset) {
  return __shfl_xor_sync(mask, value, offset);
}
LGD_DEVICE unsigned ballot(unsigned mask, bool mine) {
  return __ballot_sync(mask, mine);
}
LGD_DEVICE int lowest_bit(unsigned votes) { // of at least one
  return __ffs(votes) - 1;
}
LGD_DEVICE void warp_sync(unsigned mask) {
  __syncwarp(mask);
}
LGD_DEVICE void block_sync() {
  __syncthreads();
}
LGD_DEVICE bool block_any(bool mine) {
  return __syncthreads_or(mine);
}

// The launch's dynamic shared memory, all the shared memory that a block has.
LGD_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

LGD_DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
LGD_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
// Where `address`, in this block's shared memory, lies in that of another block of the cluster.
template <typename A>
LGD_DEVICE A* cluster_pointer(A* address, int rank) {
  uint64_t result;
  asm("mapa.u64 %0, %1, %2;" : "=l"(result) : "l"(address), "r"(rank));
  return reinterpret_cast<A*>(result);
}

#else // before clusters, a block is one by itself

LGD_DEVICE int cluster_rank() {
  return 0;
}
LGD_DEVICE void cluster_sync() {
  __syncthreads();
}
template <typename A>
LGD_DEVICE A* cluster_pointer(A* address, int) {
  return address;
}

#endif

// Starts a kernel; returns its cudaError_t.
template <auto kernel, typename... Arguments>
int launch(const Grid& grid, void* stream, const Arguments&... arguments) {
  if (grid.blocks > std::numeric_limits<int>::max()) {
    return cudaErrorInvalidConfiguration;
  }
  if (grid.shared_bytes > 48 * 1024) { // the limit without asking
    const int bytes = static_cast<int>(grid.shared_bytes);
    if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
      return error;
    }
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads_x, grid.threads_y);
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

#endif

} // namespace lgd::gpu
