// Vec: kLanes floats in one register of the level being compiled, with loads, stores and rounding
// for float, Half and BFloat16. Conversions round to nearest even, as torch's do.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "cpu/isa.h"

#if !defined(LT_ISA_SCALAR)
#include <immintrin.h>
#endif

namespace llamatelemetry {
namespace LT_ISA {

#define LT_INLINE static inline __attribute__((always_inline))
#define LT_SPECIALISED inline __attribute__((always_inline))  // linkage of the template: static

LT_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
LT_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// One element at a time: tails, tables, and the whole of the scalar level.
LT_INLINE float to_float(float x) { return x; }
LT_INLINE float to_float(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
LT_INLINE float to_float(Half x) {
#if defined(LT_ISA_SCALAR)
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127; subnormals come out exact.
  const uint32_t finite = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  const uint32_t inf_or_nan = 0x7f800000 | (magnitude << 13);
  return bits_to_float(sign | (magnitude >= 0x7c00 ? inf_or_nan : finite));
#else
  return _cvtsh_ss(x.bits);
#endif
}

template <typename T>
LT_INLINE T from_float(float x);
template <>
LT_SPECIALISED float from_float<float>(float x) {
  return x;
}
template <>
LT_SPECIALISED BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
LT_SPECIALISED Half from_float<Half>(float x) {
#if defined(LT_ISA_SCALAR)
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to inf
  if (magnitude < 0x38800000) {  // subnormal: let the float adder round at 2^-24
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
#else
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#endif
}

// x as it reads back after being stored as a T.
template <typename T>
LT_INLINE float rounded_to(float x) {
  return to_float(from_float<T>(x));
}

#if defined(LT_ISA_SCALAR)

typedef float VecRegister __attribute__((vector_size(16)));  // of gcc and clang, on any machine
struct Vec {
  static constexpr int kLanes = sizeof(VecRegister) / sizeof(float);
  VecRegister v;
};

#define LT_LANES for (int i = 0; i < Vec::kLanes; ++i)
LT_INLINE Vec vec_set(float x) { return {VecRegister{x, x, x, x}}; }
template <typename T>
LT_INLINE Vec vec_load(const T* p) {
  Vec r;
  LT_LANES r.v[i] = to_float(p[i]);
  return r;
}
template <typename T>
LT_INLINE void vec_store(T* p, Vec x) {
  LT_LANES p[i] = from_float<T>(x.v[i]);
}
LT_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
LT_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
LT_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
LT_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
LT_INLINE Vec vec_fma(Vec a, Vec b, Vec c) { return a * b + c; }
LT_INLINE Vec vec_max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
LT_INLINE Vec vec_min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
LT_INLINE Vec vec_round(Vec a) {
  Vec r;
  LT_LANES r.v[i] = std::nearbyintf(a.v[i]);
  return r;
}
// 2^n for integral n in [-127, 128]: n + 127 is the exponent field.
LT_INLINE Vec vec_exp2_integral(Vec n) {
  Vec r;
  LT_LANES r.v[i] = bits_to_float(static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23);
  return r;
}
// x, its sign flipped where that of y is set.
LT_INLINE Vec vec_flip_sign(Vec x, Vec y) {
  Vec r;
  LT_LANES r.v[i] = std::signbit(y.v[i]) ? -x.v[i] : x.v[i];
  return r;
}
// (a, b, c, d, ...) -> (-b, a, -d, c, ...)
LT_INLINE Vec vec_rotate_pairs(Vec a) { return {VecRegister{-a.v[1], a.v[0], -a.v[3], a.v[2]}}; }
LT_INLINE float vec_sum(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
// Bit i is set where a[i] >= b[i], which no NaN is.
LT_INLINE uint32_t vec_at_least(Vec a, Vec b) {
  uint32_t mask = 0;
  LT_LANES mask |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
  return mask;
}
LT_INLINE float vec_reduce_max(Vec a) {
  float m = a.v[0];
  for (int i = 1; i < Vec::kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
#undef LT_LANES

#else  // AVX2 and AVX-512 differ in names only

#if defined(LT_ISA_AVX512)
#define LT_MM(name) _mm512_##name
#define LT_HALF_MM(name) _mm256_##name
#define LT_HALF_SI(name) _mm256_##name##_si256
using VecRegister = __m512;
using HalfWidthRegister = __m256i;
#else
#define LT_MM(name) _mm256_##name
#define LT_HALF_MM(name) _mm_##name
#define LT_HALF_SI(name) _mm_##name##_si128
using VecRegister = __m256;
using HalfWidthRegister = __m128i;
#endif

struct Vec {
  static constexpr int kLanes = sizeof(VecRegister) / sizeof(float);
  VecRegister v;
};

LT_INLINE Vec vec_set(float x) { return {LT_MM(set1_ps)(x)}; }
LT_INLINE Vec operator+(Vec a, Vec b) { return {LT_MM(add_ps)(a.v, b.v)}; }
LT_INLINE Vec operator-(Vec a, Vec b) { return {LT_MM(sub_ps)(a.v, b.v)}; }
LT_INLINE Vec operator*(Vec a, Vec b) { return {LT_MM(mul_ps)(a.v, b.v)}; }
LT_INLINE Vec operator/(Vec a, Vec b) { return {LT_MM(div_ps)(a.v, b.v)}; }
LT_INLINE Vec vec_fma(Vec a, Vec b, Vec c) { return {LT_MM(fmadd_ps)(a.v, b.v, c.v)}; }
LT_INLINE Vec vec_max(Vec a, Vec b) { return {LT_MM(max_ps)(a.v, b.v)}; }
LT_INLINE Vec vec_min(Vec a, Vec b) { return {LT_MM(min_ps)(a.v, b.v)}; }

LT_INLINE Vec vec_load(const float* p) { return {LT_MM(loadu_ps)(p)}; }
LT_INLINE Vec vec_load(const Half* p) {
  return {LT_MM(cvtph_ps)(LT_HALF_SI(loadu)(reinterpret_cast<const HalfWidthRegister*>(p)))};
}
LT_INLINE void vec_store(float* p, Vec x) { LT_MM(storeu_ps)(p, x.v); }
LT_INLINE void vec_store(Half* p, Vec x) {
  LT_HALF_SI(storeu)(reinterpret_cast<HalfWidthRegister*>(p),
                     LT_MM(cvtps_ph)(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#if defined(LT_ISA_AVX512)

LT_INLINE Vec vec_load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
LT_INLINE __m512i bfloat16_in_high_half(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q),
                               _mm512_set1_epi32(0x7fc00000));
}
LT_INLINE void vec_store(BFloat16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(bfloat16_in_high_half(x), 16)));
}
LT_INLINE Vec vec_round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
LT_INLINE Vec vec_exp2_integral(Vec n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
LT_INLINE Vec vec_flip_sign(Vec x, Vec y) {
  return {_mm512_xor_ps(x.v, _mm512_and_ps(y.v, _mm512_set1_ps(-0.0f)))};
}
LT_INLINE Vec vec_rotate_pairs(Vec a) {
  const __m512 sign = _mm512_castsi512_ps(_mm512_set1_epi64(0x80000000));
  return {_mm512_xor_ps(_mm512_permute_ps(a.v, 0xb1), sign)};
}
LT_INLINE float vec_sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
LT_INLINE float vec_reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
LT_INLINE uint32_t vec_at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }

#if defined(__AVX512BF16__)
// A Vec of words: kLanes pairs of bfloat16, the first of each in the low half.
// sum + the dot products of the pairs of a and b; subnormals count as 0.
LT_INLINE Vec vec_dot_pairs(Vec a, Vec b, Vec sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}
// Pair i is (first[i], second[i]), rounded to nearest even.
LT_INLINE Vec vec_round_pairs(Vec first, Vec second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, rounded))};
}
// pairs[i] = (first[i], second[i]) for i < size, a multiple of 8.
LT_INLINE void vec_interleave(const BFloat16* first, const BFloat16* second, int64_t size,
                              float* pairs) {
  for (int64_t i = 0; i < size; i += 8) {
    const __m256i low =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first + i)));
    const __m256i high =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(second + i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + i),
                        _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
  }
}
#endif

#else  // AVX2

LT_INLINE Vec vec_load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
LT_INLINE __m256i bfloat16_in_high_half(Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan);
}
LT_INLINE void vec_store(BFloat16* p, Vec x) {
  const __m256i r = _mm256_srli_epi32(bfloat16_in_high_half(x), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
LT_INLINE Vec vec_round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
LT_INLINE Vec vec_exp2_integral(Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}
LT_INLINE Vec vec_flip_sign(Vec x, Vec y) {
  return {_mm256_xor_ps(x.v, _mm256_and_ps(y.v, _mm256_set1_ps(-0.0f)))};
}
LT_INLINE Vec vec_rotate_pairs(Vec a) {
  const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi64x(0x80000000));
  return {_mm256_xor_ps(_mm256_permute_ps(a.v, 0xb1), sign)};
}
LT_INLINE float vec_sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
LT_INLINE float vec_reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
LT_INLINE uint32_t vec_at_least(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}

#endif
#undef LT_MM
#undef LT_HALF_MM
#undef LT_HALF_SI
#endif

// The first n < kLanes elements, the rest fill; and back.
template <typename T>
LT_INLINE Vec vec_load_first(const T* p, int n, float fill = 0.0f) {
  float buffer[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) buffer[i] = i < n ? to_float(p[i]) : fill;
  return vec_load(buffer);
}
template <typename T>
LT_INLINE void vec_store_first(T* p, int n, Vec x) {
  float buffer[Vec::kLanes];
  vec_store(buffer, x);
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(buffer[i]);
}

// x as it reads back after being stored as Ts.
template <typename T>
LT_INLINE Vec vec_rounded_to(Vec x) {
  T buffer[Vec::kLanes];
  vec_store(buffer, x);
  return vec_load(buffer);
}
template <>
LT_SPECIALISED Vec vec_rounded_to<float>(Vec x) {
  return x;
}
#if defined(LT_ISA_AVX512)
template <>
LT_SPECIALISED Vec vec_rounded_to<Half>(Vec x) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
template <>
LT_SPECIALISED Vec vec_rounded_to<BFloat16>(Vec x) {
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm512_castsi512_ps(_mm512_and_si512(bfloat16_in_high_half(x), high_half))};
}
#elif defined(LT_ISA_AVX2)
template <>
LT_SPECIALISED Vec vec_rounded_to<Half>(Vec x) {
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
template <>
LT_SPECIALISED Vec vec_rounded_to<BFloat16>(Vec x) {
  const __m256i high_half = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(bfloat16_in_high_half(x), high_half))};
}
#endif

// Integral floats in [-128, 127] as int8.
LT_INLINE void vec_store_int8(int8_t* p, Vec x) {
#if defined(LT_ISA_AVX512)
  const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
#elif defined(LT_ISA_AVX2)
  const __m256i words = _mm256_cvtps_epi32(x.v);
  const __m128i halves =
      _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
#else
  for (int i = 0; i < Vec::kLanes; ++i) p[i] = static_cast<int8_t>(x.v[i]);
#endif
}

// e^x within 2 ulp; 0 below -104, inf above 88.7, NaN stays NaN (vec_max and vec_min return their
// second operand then). Cody and Waite's reduction, then the Taylor polynomial of degree 6 on
// [-ln 2 / 2, ln 2 / 2].
LT_INLINE Vec vec_exp(Vec x) {
  x = vec_min(vec_set(89.0f), vec_max(vec_set(-104.0f), x));
  const Vec n = vec_round(x * vec_set(1.44269504f));
  Vec r = vec_fma(n, vec_set(-0.693359375f), x);
  r = vec_fma(n, vec_set(2.12194440e-4f), r);
  Vec p = vec_set(1.3888889e-3f);
  p = vec_fma(p, r, vec_set(8.3333333e-3f));
  p = vec_fma(p, r, vec_set(4.1666667e-2f));
  p = vec_fma(p, r, vec_set(1.6666667e-1f));
  p = vec_fma(p, r, vec_set(0.5f));
  p = vec_fma(p, r, vec_set(1.0f));
  p = vec_fma(p, r, vec_set(1.0f));
  // n reaches 128, whose power of two alone overflows: scale in two steps.
  const Vec half_n = vec_round(n * vec_set(0.5f));
  return p * vec_exp2_integral(half_n) * vec_exp2_integral(n - half_n);
}

// tanh within 1e-7 of 1, which is what 1 + tanh(x) needs.
LT_INLINE Vec vec_tanh(Vec x) {
  const Vec e = vec_exp(vec_set(2.0f) * vec_flip_sign(x, x));
  return vec_flip_sign(vec_set(1.0f) - vec_set(2.0f) / (e + vec_set(1.0f)), x);
}

// erf within 1.5e-7 of 1: Abramowitz and Stegun 7.1.26, as torch's vectorised erf computes it.
LT_INLINE Vec vec_erf(Vec x) {
  const Vec one = vec_set(1.0f);
  const Vec t = one / vec_fma(vec_set(0.3275911f), vec_flip_sign(x, x), one);
  Vec p = vec_set(1.061405429f);
  p = vec_fma(p, t, vec_set(-1.453152027f));
  p = vec_fma(p, t, vec_set(1.421413741f));
  p = vec_fma(p, t, vec_set(-0.284496736f));
  p = vec_fma(p, t, vec_set(0.254829592f));
  const Vec tail = t * vec_exp(vec_set(0.0f) - x * x);
  return vec_flip_sign(vec_fma(vec_set(0.0f) - tail, p, one), x);
}

// 2^x for x <= 127; 0 below -127 (-126 with AVX-512), NaN stays NaN. The polynomial of degree 6
// with the least relative error, 2e-9, on [-1/2, 1/2].
LT_INLINE Vec vec_exp2(Vec x) {
#if defined(LT_ISA_AVX512)
  const __mmask16 is_kept = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
#else
  x = vec_max(vec_set(-127.0f), x);
#endif
  const Vec n = vec_round(x);
  const Vec r = x - n;
  Vec p = vec_set(1.53458119e-4f);
  p = vec_fma(p, r, vec_set(1.33999312e-3f));
  p = vec_fma(p, r, vec_set(9.61848896e-3f));
  p = vec_fma(p, r, vec_set(5.55032878e-2f));
  p = vec_fma(p, r, vec_set(2.40226469e-1f));
  p = vec_fma(p, r, vec_set(6.93147206e-1f));
  p = vec_fma(p, r, vec_set(1.0f));
#if defined(LT_ISA_AVX512)
  return {_mm512_maskz_scalef_ps(is_kept, p.v, n.v)};
#else
  return p * vec_exp2_integral(n);
#endif
}

#if defined(LT_ISA_AVX512)
// to[c * to_stride + r] = from[r * from_stride + c] for r, c < 16.
LT_INLINE void vec_transpose_16(const float* from, int64_t from_stride, float* to,
                                int64_t to_stride) {
  __m512 x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // x[i + j]: columns j, 4 + j, 8 + j, 12 + j of rows i to i + 3
    x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
    x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 even_above = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88);
    const __m512 odd_above = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd);
    const __m512 even_below = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
    const __m512 odd_below = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
    float* column = to + j * to_stride;
    _mm512_storeu_ps(column, _mm512_shuffle_f32x4(even_above, even_below, 0x88));
    _mm512_storeu_ps(column + 4 * to_stride, _mm512_shuffle_f32x4(odd_above, odd_below, 0x88));
    _mm512_storeu_ps(column + 8 * to_stride, _mm512_shuffle_f32x4(even_above, even_below, 0xdd));
    _mm512_storeu_ps(column + 12 * to_stride, _mm512_shuffle_f32x4(odd_above, odd_below, 0xdd));
  }
}
#endif

LT_INLINE void vec_transpose_4(const float* from, int64_t from_stride, float* to,
                               int64_t to_stride) {
#if defined(LT_ISA_SCALAR)
  for (int i = 0; i < 16; ++i) to[i / 4 * to_stride + i % 4] = from[i % 4 * from_stride + i / 4];
#else
  __m128 x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm_loadu_ps(from + i * from_stride);
  _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_stride, x[i]);
#endif
}

// to[c * to_stride + r] = from[r * from_stride + c] for r < height, c < width, multiples of 4.
LT_INLINE void vec_transpose(const float* from, int64_t from_stride, int64_t height, int64_t width,
                             float* to, int64_t to_stride) {
  int64_t r = 0;
#if defined(LT_ISA_AVX512)
  for (; r + 16 <= height; r += 16) {
    int64_t c = 0;
    for (; c + 16 <= width; c += 16) {
      vec_transpose_16(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
    for (; c < width; c += 4) {
      for (int i = 0; i < 16; i += 4) {
        vec_transpose_4(from + (r + i) * from_stride + c, from_stride, to + c * to_stride + r + i,
                        to_stride);
      }
    }
  }
#endif
  for (; r < height; r += 4) {
    for (int64_t c = 0; c < width; c += 4) {
      vec_transpose_4(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
  }
}

// sums[0..3] = the sums of a, b, c and d.
LT_INLINE void vec_sum4(Vec a, Vec b, Vec c, Vec d, float* sums) {
#if defined(LT_ISA_SCALAR)
  sums[0] = vec_sum(a);
  sums[1] = vec_sum(b);
  sums[2] = vec_sum(c);
  sums[3] = vec_sum(d);
#else
#if defined(LT_ISA_AVX512)
  // Every 128-bit part becomes {a, b, c, d} summed over its four lanes.
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 wide =
      _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1));
#else
  const __m256 ab = _mm256_hadd_ps(a.v, b.v);
  const __m256 cd = _mm256_hadd_ps(c.v, d.v);
  const __m256 x = _mm256_hadd_ps(ab, cd);
#endif
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
#endif
}

}  // namespace LT_ISA
}  // namespace llamatelemetry
