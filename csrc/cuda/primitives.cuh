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
template <int N>
LGD_DEVICE void store(void* target, const Words<N>& words) {
  *static_cast<Words<N>*>(target) = words;
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

// ---------------------------------------------------------------------------------------------------------------------
// Products on tensor cores, by all lanes of a warp: d += a b, of which each lane has a fragment in its registers. With
// g = lane / 4 and t = lane % 4, counted in rows and columns:
//
//   d (16, 8)               (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   a (16, 16) of 16 bits   the pairs at (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   b (16, 8) of 16 bits    the pairs in a column at (2t, g), (2t + 8, g)
//   a (16, 8) of TF32       (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b (8, 8) of TF32        (t, g), (t + 4, g)
// ---------------------------------------------------------------------------------------------------------------------

#ifdef LGD_CUDA_ON_HOST

// What tensor cores take as it is: 10 bits of mantissa, ties away from zero.
LGD_DEVICE float round_to_tf32(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return std::isfinite(x) ? bits_as<float>((bits + 0x1000u) & 0xffffe000u) : x;
}

// N matrices (8, 8) of 16 bits from shared memory: lane 8 m + r says where row r of matrix m begins. Each lane gets the
// pairs at (g, 2t) of every matrix; of its transpose, if `transposed`.
template <bool transposed, int N>
LGD_DEVICE void load_matrices(const void* row, uint32_t (&fragment)[N]) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const uint16_t* rows[kWarp];
  cuda_on_host::gather_rows(row, rows);
  for (int m = 0; m < N; ++m) {
    const auto at = [&](int i, int k) -> uint32_t { return rows[8 * m + (transposed ? k : i)][transposed ? i : k]; };
    fragment[m] = at(g, 2 * t) | at(g, 2 * t + 1) << 16;
  }
}

// d[i] += the sum of a(row, k) b(k, column) over k < depth, in order.
template <int depth, typename A, typename B>
LGD_DEVICE void multiply_lane_by_lane(float (&d)[4], const A& a, const B& b) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < depth; ++k) {
      d[i] += a(g + i / 2 * 8, k) * b(k, 2 * t + i % 2);
    }
  }
}

template <typename T>
LGD_DEVICE void multiply_halves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t of_a[kWarp][4], of_b[kWarp][2];
  cuda_on_host::gather(a, of_a);
  cuda_on_host::gather(b, of_b);
  const auto half = [](uint32_t pair, int k) { return to_float(T{static_cast<uint16_t>(pair >> k % 2 * 16)}); };
  multiply_lane_by_lane<16>(
      d, [&](int row, int k) { return half(of_a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k); },
      [&](int k, int column) { return half(of_b[column * 4 + k % 8 / 2][k / 8], k); });
}

LGD_DEVICE void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t of_a[kWarp][4], of_b[kWarp][2];
  cuda_on_host::gather(a, of_a);
  cuda_on_host::gather(b, of_b);
  const auto number = [](uint32_t bits) { return bits_as<float>(bits & 0xffffe000u); };
  multiply_lane_by_lane<8>(
      d, [&](int row, int k) { return number(of_a[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]); },
      [&](int k, int column) { return number(of_b[column * 4 + k % 4][k / 4]); });
}

#else

LGD_DEVICE float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits_as<float>(bits);
}

template <bool transposed, int N>
LGD_DEVICE void load_matrices(const void* row, uint32_t (&fragment)[N]) {
  static_assert(N == 2 || N == 4);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (N == 4 && transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (N == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address)
                 : "memory");
  }
}

#define LGD_MULTIPLY(SHAPE, TYPE)                             \
  asm("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "   \
      "{%0, %1, %2, %3};"                                     \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <typename T>
LGD_DEVICE void multiply_halves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Float16>) {
    LGD_MULTIPLY("m16n8k16", "f16");
  } else {
    LGD_MULTIPLY("m16n8k16", "bf16");
  }
}
LGD_DEVICE void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  LGD_MULTIPLY("m16n8k8", "tf32");
}

#undef LGD_MULTIPLY

#endif

} // namespace lgd::gpu
