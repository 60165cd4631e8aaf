#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUBlas.h>

namespace lgd {

void multiply_tile(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
    int64_t c_stride, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, c_stride, accumulate, a, b, c);
}

void multiply_tile(
    int64_t m, int64_t n, int64_t k, const double* a, int64_t a_stride, const double* b, int64_t b_stride, double* c,
    int64_t c_stride, bool accumulate) {
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  const auto copy = [](const double* data, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<double*>(data), {rows, columns}, {stride, 1}, at::kDouble)
        .clone(at::MemoryFormat::Contiguous);
  };
  // copies, because the library's bits depend on where its operands start in memory
  const at::Tensor product = at::mm(copy(a, m, k, a_stride), copy(b, k, n, b_stride));
  at::Tensor result = at::from_blob(c, {m, n}, {c_stride, 1}, at::kDouble);
  accumulate ? result.add_(product) : result.copy_(product);
}

void multiply_tile(
    int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t a_stride, const c10::BFloat16* b, int64_t b_stride,
    float* c, int64_t c_stride, bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, c_stride, accumulate, a, b, c);
}

bool multiplies_bfloat16() {
  static const bool works = [] {
    if (!__builtin_cpu_supports("avx512bf16")) {
      return false;
    }
    const c10::BFloat16 zeros[32 * 32] = {};
    float product[32 * 32];
    try {
      at::native::cpublas::brgemm(32, 32, 32, 32, 32, 32, false, zeros, zeros, product);
      at::native::cpublas::brgemm_release(true);
      return true;
    } catch (const c10::Error&) { // a build of torch without these kernels
      return false;
    }
  }();
  return works && at::globalContext().userEnabledMkldnn();
}

void release_multiplier() {
  at::native::cpublas::brgemm_release(multiplies_bfloat16());
}

} // namespace lgd
