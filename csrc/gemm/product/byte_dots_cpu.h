// Dot products of bytes, lanes along k: what an instruction set makes of the bytes of a (left) and
// of b (right), how it multiplies kStep of them, and how lanes become sums.
//
//   Code         a byte as it lies in memory
//   Left, Right  what it becomes where it is copied first, zeros behind the last of a row
//   Sum, Sums    of whole dot products, int32_t, of e4m3 float; four of them
//   kDepth       at most so much of k is summed in lanes
//   excess(row)  what the lanes add to a dot product of a row of Left too much
#pragma once

#include <type_traits>

#include "gemm/product/params.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

typedef int32_t FourInts __attribute__((vector_size(16)));
typedef float FourFloats __attribute__((vector_size(16)));

#define LT_DOTS_MEMBER static inline __attribute__((always_inline))

// The first count of a step's bytes, then zeros.
template <typename Code, int kStep>
LT_INLINE void copy_first(const Code* from, int count, Code (&to)[kStep]) {
  std::memset(to, 0, sizeof to);
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(Code));
}

// A byte of float8_e4m3fn has its exponent and mantissa where the other format has them, whose bias
// is larger: 2^8 times in float16, 2^120 times in float32.
#if defined(LT_ISA_SCALAR)
constexpr float kLeftFactor = 1.0f;
LT_INLINE float code_to_float(int8_t x) { return static_cast<float>(x); }
LT_INLINE float code_to_float(E4M3 x) {
  const uint32_t size = x.bits & 0x7f, sign = static_cast<uint32_t>(x.bits & 0x80) << 24;
  if (size == 0x7f) return bits_to_float(sign | 0x7fc00000);
  // As denormal floats these would be 0 where the CPU flushes them.
  if (size < 8) return bits_to_float(sign | float_to_bits(static_cast<float>(size) * 0x1p-9f));
  return bits_to_float(sign | float_to_bits(bits_to_float(size << 20) * 0x1p120f));
}
template <typename Code>
LT_INLINE Vec decode(const Code* p) {
  float values[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) values[i] = code_to_float(p[i]);
  return vec_load(values);
}
#else
constexpr float kLeftFactor = 0x1p16f;  // both sides are decoded 2^8 times too small
#if defined(LT_ISA_AVX512)
#define LT_WORDS(name) _mm256_##name
#define LT_WORDS_SI(name) _mm256_##name##_si256
LT_INLINE __m128i load_codes(const E4M3* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
LT_INLINE Vec halves_to_floats(__m256i x) { return {_mm512_cvtph_ps(x)}; }
#else
#define LT_WORDS(name) _mm_##name
#define LT_WORDS_SI(name) _mm_##name##_si128
LT_INLINE __m128i load_codes(const E4M3* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
LT_INLINE Vec halves_to_floats(__m128i x) { return {_mm256_cvtph_ps(x)}; }
#endif
LT_INLINE Vec decode(const E4M3* p) {
  const auto words = LT_WORDS(slli_epi16)(LT_WORDS(cvtepi8_epi16)(load_codes(p)), 7);
  const auto halves = LT_WORDS_SI (and)(words, LT_WORDS(set1_epi16)(static_cast<int16_t>(0xbf80)));
  const auto size = LT_WORDS_SI (and)(words, LT_WORDS(set1_epi16)(0x3f80));
  const auto nan = LT_WORDS(cmpeq_epi16)(size, LT_WORDS(set1_epi16)(0x3f80));
  return halves_to_floats(LT_WORDS_SI(or)(halves, nan));
}
#undef LT_WORDS
#undef LT_WORDS_SI
#endif

// Floats, exact for int8 up to kDepth of k.
template <typename C>
struct FloatDots {
  using Code = C;
  using Left = float;
  using Right = float;
  using Sum = std::conditional_t<std::is_same_v<C, int8_t>, int32_t, float>;
  using Sums = std::conditional_t<std::is_same_v<C, int8_t>, FourInts, FourFloats>;
  using Lanes = Vec;
  static constexpr int kStep = Vec::kLanes;
  // e4m3: as many terms a lane as gemm/linear_cpu.cpp has.
  static constexpr int kDepth = std::is_same_v<C, int8_t> ? 1024 : 32 * Vec::kLanes;

  LT_DOTS_MEMBER Vec zero() { return vec_set(0.0f); }
  LT_DOTS_MEMBER Vec left(const Code* p) { return decode(p) * vec_set(kLeftFactor); }
  LT_DOTS_MEMBER Vec left(const float* p) { return vec_load(p); }
  LT_DOTS_MEMBER Vec right(const Code* p) { return decode(p); }
  LT_DOTS_MEMBER Vec right(const float* p) { return vec_load(p); }
  LT_DOTS_MEMBER Vec add(Vec sum, Vec left, Vec right) { return vec_fma(left, right, sum); }
  LT_DOTS_MEMBER void store(float* to, Vec x) { vec_store(to, x); }
  LT_DOTS_MEMBER Sum excess(const float*, int) { return 0; }
  LT_DOTS_MEMBER Sums sum4(const Vec (&lanes)[4]) {
    FourFloats sums;
    vec_sum4(lanes[0], lanes[1], lanes[2], lanes[3], reinterpret_cast<float*>(&sums));
    return __builtin_convertvector(sums, Sums);
  }
};

#if defined(LT_ISA_AVX512)

// vpdpbusd takes unsigned bytes by signed ones: b + 128, and 128 times the sum of a row of a less.
struct Int8Dots {
  using Code = int8_t;
  using Left = int8_t;
  using Right = uint8_t;
  using Sum = int32_t;
  using Sums = FourInts;
  using Lanes = __m512i;
  static constexpr int kStep = 64;
  static constexpr int kDepth = 1024;

  LT_DOTS_MEMBER __m512i zero() { return _mm512_setzero_si512(); }
  LT_DOTS_MEMBER __m512i left(const int8_t* p) { return _mm512_loadu_si512(p); }
  LT_DOTS_MEMBER __m512i right(const int8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  }
  LT_DOTS_MEMBER __m512i right(const uint8_t* p) { return _mm512_loadu_si512(p); }
  LT_DOTS_MEMBER __m512i add(__m512i sum, __m512i left, __m512i right) {
    return _mm512_dpbusd_epi32(sum, right, left);
  }
  LT_DOTS_MEMBER void store(void* to, __m512i x) { _mm512_storeu_si512(to, x); }
  LT_DOTS_MEMBER int32_t excess(const int8_t* row, int depth) {
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < depth; i += kStep) {
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), left(row + i));
    }
    return 128 * _mm512_reduce_add_epi32(sum);
  }
  LT_DOTS_MEMBER FourInts sum4(const __m512i (&x)[4]) {
    // Every 128-bit part becomes the four sums over its four lanes.
    const __m512i ab =
        _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const __m512i cd =
        _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    const __m512i wide =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(wide), _mm512_extracti64x4_epi64(wide, 1));
    return (FourInts)_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  }
};

#elif defined(LT_ISA_AVX2)

// vpmaddwd: pairs of 16 bits, whose products no sum of two can overflow.
struct Int8Dots {
  using Code = int8_t;
  using Left = int16_t;
  using Right = int16_t;
  using Sum = int32_t;
  using Sums = FourInts;
  using Lanes = __m256i;
  static constexpr int kStep = 16;
  static constexpr int kDepth = 1024;

  LT_DOTS_MEMBER __m256i zero() { return _mm256_setzero_si256(); }
  LT_DOTS_MEMBER __m256i left(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  LT_DOTS_MEMBER __m256i left(const int16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  LT_DOTS_MEMBER __m256i right(const int8_t* p) { return left(p); }
  LT_DOTS_MEMBER __m256i right(const int16_t* p) { return left(p); }
  LT_DOTS_MEMBER __m256i add(__m256i sum, __m256i left, __m256i right) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(left, right));
  }
  LT_DOTS_MEMBER void store(int16_t* to, __m256i x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
  }
  LT_DOTS_MEMBER int32_t excess(const int16_t*, int) { return 0; }
  LT_DOTS_MEMBER FourInts sum4(const __m256i (&x)[4]) {
    const __m256i all =
        _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
    return (FourInts)_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  }
};

#else
using Int8Dots = FloatDots<int8_t>;
#endif

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
