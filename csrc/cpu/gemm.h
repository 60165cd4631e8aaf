// Matrix products of tiles. Not vector code itself: it calls a library that chooses its instruction set by itself.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace lgd {

// C = A B, or C += A B, for A (m, k), B (k, n), C (m, n), rows contiguous and `..._stride` elements apart. float32 runs
// on ATen's brgemm, which has kernels of its own for each shape; float64 on at::mm.
void multiply_tile(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
    int64_t c_stride, bool accumulate);
void multiply_tile(
    int64_t m, int64_t n, int64_t k, const double* a, int64_t a_stride, const double* b, int64_t b_stride, double* c,
    int64_t c_stride, bool accumulate);

// For an even k, and B in pairs of rows: its element (i, j) is b[(i / 2 * b_stride + j) * 2 + i % 2]. Needs a CPU that
// multiplies_bfloat16().
void multiply_tile(
    int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t a_stride, const c10::BFloat16* b, int64_t b_stride,
    float* c, int64_t c_stride, bool accumulate);

// Whether this CPU has instructions for products of bfloat16, and the library uses them.
bool multiplies_bfloat16();

// To be called by each thread that has multiplied tiles, when it is done.
void release_multiplier();

} // namespace lgd
