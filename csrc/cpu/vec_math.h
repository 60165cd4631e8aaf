// Reductions of at::vec vectors, and their exp, tanh and log for the ranges that a softmax needs: one or two operations
// cheaper per vector than the general functions, and exact where it matters (exp(0) = 1, exp(-inf) = 0, NaN stays NaN).
#pragma once

#include <ATen/cpu/vec/functional_base.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lgd {
inline namespace CPU_CAPABILITY {

using at::vec::Vectorized;

// 2^n for the whole number n that the low mantissa bits of `shifted` hold with the exponent's bias added.
inline Vectorized<float> power_of_two(Vectorized<float> shifted) {
  return at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << Vectorized<int32_t>(23));
}

inline Vectorized<double> power_of_two(Vectorized<double> shifted) {
  return at::vec::cast<double>(at::vec::cast<int64_t>(shifted) << Vectorized<int64_t>(52));
}

// Constants of exp(x) = 2^n exp(r), n = round(x / ln 2), r = x - n ln 2. Below `smallest`, n is -bias and 2^n comes out
// as 0. The magic number 1.5 * 2^mantissa + bias rounds to a whole number and adds the bias in one operation.
template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float magic = 12582912.0f + 127.0f;
  static constexpr float smallest = -88.02969193f;
  static constexpr float ln2_high = 0.693359375f; // few bits: n * ln2_high is exact
  static constexpr float ln2_low = -2.12194440e-4f;
};

template <>
struct ExpConstants<double> {
  static constexpr double magic = 6755399441055744.0 + 1023.0;
  static constexpr double smallest = -709.0895657128241;
  static constexpr double ln2_high = 0.693145751953125;
  static constexpr double ln2_low = 1.42860682030941723212e-6;
};

// exp(r) for |r| <= ln(2) / 2: minimax of degree 6 with p(0) = 1, relative error 2.6e-9.
inline Vectorized<float> exp_polynomial(Vectorized<float> r) {
  using Vec = Vectorized<float>;
  Vec p = at::vec::fmadd(Vec(0.00140612772806f), r, Vec(0.00837902073341f));
  p = at::vec::fmadd(p, r, Vec(0.0416647764949f));
  p = at::vec::fmadd(p, r, Vec(0.166663653149f));
  p = at::vec::fmadd(p, r, Vec(0.500000043465f));
  p = at::vec::fmadd(p, r, Vec(1.00000004967f));
  return at::vec::fmadd(p, r, Vec(1.0f));
}

// The same by Taylor's series to degree 13: relative error 4e-18.
inline Vectorized<double> exp_polynomial(Vectorized<double> r) {
  using Vec = Vectorized<double>;
  constexpr double inverse_factorials[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  Vec p(1.0 / 6227020800.0);
  for (const double coefficient : inverse_factorials) {
    p = at::vec::fmadd(p, r, Vec(coefficient));
  }
  return p;
}

// exp(x) for x <= 0, with results below 2^-126 (2^-1022) flushed to 0.
template <typename T>
inline Vectorized<T> exp_nonpositive(Vectorized<T> x) {
  using Vec = Vectorized<T>;
  using K = ExpConstants<T>;
  x = at::vec::clamp_min(x, Vec(K::smallest)); // keeps NaN: clamp_min returns x where a comparison with it is false
  const Vec shifted = at::vec::fmadd(x, Vec(static_cast<T>(1.4426950408889634)), Vec(K::magic));
  const Vec n = shifted - Vec(K::magic);
  Vec r = at::vec::fmadd(n, Vec(-K::ln2_high), x);
  r = at::vec::fmadd(n, Vec(-K::ln2_low), r);
  return exp_polynomial(r) * power_of_two(shifted);
}

#if defined(CPU_CAPABILITY_AVX512)

// bits of 2^(j / 32), less j << 18, so that adding n << 18 for n = 32 k + j gives the bits of 2^(n / 32)
alignas(64) constexpr uint32_t kPowersOfTwo[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
};

// The same for float in 11 operations where the general code takes 14: exp(x) = 2^(n / 32) exp(r), n = round(32 x / ln
// 2), |r| <= ln(2) / 64, with 2^(n / 32) from a table in two registers and exp(r) to degree 2 (error 5e-8). 10.9 -> 7.6
// cycles for 16 elements of the second pass on a Zen 4 core.
template <>
inline Vectorized<float> exp_nonpositive(Vectorized<float> x) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ); // NaN stays
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(46.16624130844683f), magic);
  const __m512i bits = _mm512_castps_si512(shifted);
  const __m512 n = _mm512_sub_ps(shifted, magic);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.021660849392498290f), x);
  const __m512i table = _mm512_permutex2var_epi32(
      _mm512_load_si512(kPowersOfTwo), bits, _mm512_load_si512(kPowersOfTwo + 16)); // reads the low 5 bits of n
  const __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(table, _mm512_slli_epi32(bits, 18)));
  const __m512 slope = _mm512_fmadd_ps(r, _mm512_set1_ps(0.5f), _mm512_set1_ps(1.00001466f));
  return _mm512_maskz_fmadd_ps(keep, _mm512_mul_ps(power, r), slope, power);
}

#endif

// `inside` in the first n lanes, `outside` in the others. (Vectorized::set is a call, for which the compiler keeps
// every constant of the surrounding loop in memory: 8 loads for each vector.)
template <typename T>
inline Vectorized<T> first_lanes(int64_t n, Vectorized<T> inside, Vectorized<T> outside) {
  using Vec = Vectorized<T>;
  return Vec::blendv(outside, inside, Vec::arange(T(0), T(1)) < Vec(static_cast<T>(n)));
}

template <typename T>
inline T sum_of_lanes(Vectorized<T> lanes) {
  using Vec = Vectorized<T>;
  return at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, lanes);
}

template <typename T>
inline T max_of_lanes(Vectorized<T> lanes) {
  using Vec = Vectorized<T>;
  return at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return at::vec::clamp_min(a, b); }, lanes);
}

// x in the lanes where a == b, y in the others; where a < b likewise, and where a is NaN. (Vectorized::blendv makes a
// vector of the mask, and then a mask of it again: 1.16 -> 0.94 ms for a visit of 32 layers of 64 tanh units.)
template <typename T>
inline Vectorized<T> where_equal(Vectorized<T> a, Vectorized<T> b, Vectorized<T> x, Vectorized<T> y) {
  return Vectorized<T>::blendv(y, x, a == b);
}
template <typename T>
inline Vectorized<T> where_less(Vectorized<T> a, Vectorized<T> b, Vectorized<T> x, Vectorized<T> y) {
  return Vectorized<T>::blendv(y, x, a < b);
}
template <typename T>
inline Vectorized<T> where_nan(Vectorized<T> a, Vectorized<T> x, Vectorized<T> y) {
  return Vectorized<T>::blendv(y, x, a != a);
}

// |magnitude| with the sign of x.
template <typename T>
inline Vectorized<T> with_sign_of(Vectorized<T> x, Vectorized<T> magnitude) {
  return magnitude | (x & Vectorized<T>(T(-0.0)));
}

#if defined(CPU_CAPABILITY_AVX512)

#define LGD_DEFINE_WHERE(T, SUFFIX)                                                                      \
  template <>                                                                                            \
  inline Vectorized<T> where_equal(Vectorized<T> a, Vectorized<T> b, Vectorized<T> x, Vectorized<T> y) { \
    return _mm512_mask_blend_##SUFFIX(_mm512_cmp_##SUFFIX##_mask(a, b, _CMP_EQ_OQ), y, x);               \
  }                                                                                                      \
  template <>                                                                                            \
  inline Vectorized<T> where_less(Vectorized<T> a, Vectorized<T> b, Vectorized<T> x, Vectorized<T> y) {  \
    return _mm512_mask_blend_##SUFFIX(_mm512_cmp_##SUFFIX##_mask(a, b, _CMP_LT_OQ), y, x);               \
  }                                                                                                      \
  template <>                                                                                            \
  inline Vectorized<T> where_nan(Vectorized<T> a, Vectorized<T> x, Vectorized<T> y) {                    \
    return _mm512_mask_blend_##SUFFIX(_mm512_cmp_##SUFFIX##_mask(a, a, _CMP_UNORD_Q), y, x);             \
  }

LGD_DEFINE_WHERE(float, ps)
LGD_DEFINE_WHERE(double, pd)
#undef LGD_DEFINE_WHERE

#endif

// 1 / x for x in [1, 2], NaN for NaN; relative error below 1.5e-7.
inline Vectorized<float> reciprocal(Vectorized<float> x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 r = _mm512_rcp14_ps(x);
  return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(x, r, _mm512_set1_ps(1.0f)), r);
#else
  return Vectorized<float>(1.0f) / x;
#endif
}

// y = tanh(x) and its slope 1 - y^2: (1 - t) / (1 + t) and 4 t / (1 + t)^2 with t = exp(-2 |x|); for |x| < 0.625, where
// 1 - t cancels, Cephes' polynomial. Inlined, where a call of the library's costs every register: 6.5 -> 2.3 ms for the
// 2M elements of a local_residual.
inline void tanh_with_slope(Vectorized<float> x, Vectorized<float>& y, Vectorized<float>& slope) {
  using Vec = Vectorized<float>;
  const Vec one(1.0f), magnitude = x.abs(), square = x * x;
  const Vec t = exp_nonpositive(magnitude * Vec(-2.0f)), r = reciprocal(one + t);
  const Vec large = (one - t) * r;
  Vec p = at::vec::fmadd(Vec(-5.70498872745e-3f), square, Vec(2.06390887954e-2f));
  p = at::vec::fmadd(p, square, Vec(-5.37397155531e-2f));
  p = at::vec::fmadd(p, square, Vec(1.33314422036e-1f));
  p = at::vec::fmadd(p, square, Vec(-3.33332819422e-1f));
  const Vec small = at::vec::fmadd(p * square, x, x), limit(0.625f);
  y = where_less(magnitude, limit, small, with_sign_of(x, large));
  slope = where_less(magnitude, limit, (one - small) * (one + small), Vec(4.0f) * t * (r * r));
}

inline void tanh_with_slope(Vectorized<double> x, Vectorized<double>& y, Vectorized<double>& slope) {
  const Vectorized<double> one(1.0);
  y = x.tanh();
  slope = (one - y) * (one + y);
}

// log(x) for finite x >= 1, NaN for NaN: Cephes' logf, relative error about 1e-7.
inline Vectorized<float> log_at_least_one(Vectorized<float> x) {
  using Vec = Vectorized<float>;
  using Int = Vectorized<int32_t>;
  const Int bits = at::vec::cast<int32_t>(x);
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)): subtract the bits of sqrt(1/2) before splitting
  const Int moved = bits - Int(0x3f3504f3);
  const Vec e = at::vec::convert_to_fp_of_same_size<float>(moved >> Int(23));
  const Vec m = at::vec::cast<float>((moved & Int(0x007fffff)) + Int(0x3f3504f3)) - Vec(1.0f);
  const Vec z = m * m;
  Vec p = at::vec::fmadd(Vec(7.0376836292e-2f), m, Vec(-1.1514610310e-1f));
  p = at::vec::fmadd(p, m, Vec(1.1676998740e-1f));
  p = at::vec::fmadd(p, m, Vec(-1.2420140846e-1f));
  p = at::vec::fmadd(p, m, Vec(1.4249322787e-1f));
  p = at::vec::fmadd(p, m, Vec(-1.6668057665e-1f));
  p = at::vec::fmadd(p, m, Vec(2.0000714765e-1f));
  p = at::vec::fmadd(p, m, Vec(-2.4999993993e-1f));
  p = at::vec::fmadd(p, m, Vec(3.3333331174e-1f));
  Vec y = at::vec::fmadd(e, Vec(-2.12194440e-4f), p * m * z);
  y = at::vec::fmadd(z, Vec(-0.5f), y);
  y = at::vec::fmadd(e, Vec(0.693359375f), m + y);
  return y + (x - x); // the bit arithmetic loses NaN
}

inline Vectorized<double> log_at_least_one(Vectorized<double> x) {
  double lanes[Vectorized<double>::size()];
  x.store(lanes);
  for (double& lane : lanes) {
    lane = std::log(lane);
  }
  return Vectorized<double>::loadu(lanes);
}

} // namespace CPU_CAPABILITY
} // namespace lgd
