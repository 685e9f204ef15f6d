// The 16 rows of a packed tile side by side: Words hold one 32-bit word of each row (four codes, or
// one integer sum), Floats one float of each. A register of AVX-512, two of AVX2, four of SSE.
#pragma once

#include "format/layout.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {

constexpr int kParts = kTileRows / Vec::kLanes;
#define LT_PARTS _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i)

struct Floats {
  Vec v[kParts];
};

LT_INLINE Floats floats_set(float x) {
  Floats r;
  LT_PARTS r.v[i] = vec_set(x);
  return r;
}
template <typename T>
LT_INLINE Floats floats_load(const T* p) {
  Floats r;
  LT_PARTS r.v[i] = vec_load(p + i * Vec::kLanes);
  return r;
}
template <typename T>
LT_INLINE void floats_store(T* p, Floats x) {
  LT_PARTS vec_store(p + i * Vec::kLanes, x.v[i]);
}
LT_INLINE Floats operator+(Floats a, Floats b) {
  LT_PARTS a.v[i] = a.v[i] + b.v[i];
  return a;
}
LT_INLINE Floats operator-(Floats a, Floats b) {
  LT_PARTS a.v[i] = a.v[i] - b.v[i];
  return a;
}
LT_INLINE Floats operator*(Floats a, Floats b) {
  LT_PARTS a.v[i] = a.v[i] * b.v[i];
  return a;
}
LT_INLINE Floats floats_fma(Floats a, Floats b, Floats c) {
  LT_PARTS a.v[i] = vec_fma(a.v[i], b.v[i], c.v[i]);
  return a;
}

// One register of words, per level: load, sums, bit operations, sign-extended byte, bytes of a
// table of 16 (each byte of the word an index), floats of one (the four low bits an index),
// conversion to float. dots_part<kLargest, kCount>(
// sum, code, q): sum + the dot products of kCount words of four unsigned codes of each row, none
// above kLargest, with 4 * kCount signed bytes of q, none below -127, less
// kDotSubtracts<kLargest> * (the sum of q).
LT_INLINE int32_t load_quad(const int8_t* q) {
  int32_t quad;
  std::memcpy(&quad, q, sizeof quad);
  return quad;
}

#if defined(LT_ISA_AVX512)

using WordPart = __m512i;
template <int kLargest>
constexpr int kDotSubtracts = 0;
template <int kLargest>
constexpr int kDotRun = 8;

LT_INLINE WordPart part_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
LT_INLINE WordPart part_set(int32_t x) { return _mm512_set1_epi32(x); }
LT_INLINE WordPart part_look_up(const uint8_t (&table)[16], WordPart indices) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), indices);
}
LT_INLINE Vec part_look_up(const float (&table)[16], WordPart indices) {
  return {_mm512_permutexvar_ps(indices, _mm512_loadu_ps(table))};
}
LT_INLINE WordPart part_add(WordPart a, WordPart b) { return _mm512_add_epi32(a, b); }
LT_INLINE WordPart part_and(WordPart a, WordPart b) { return _mm512_and_si512(a, b); }
LT_INLINE WordPart part_or(WordPart a, WordPart b) { return _mm512_or_si512(a, b); }
LT_INLINE WordPart part_xor(WordPart a, WordPart b) { return _mm512_xor_si512(a, b); }
LT_INLINE WordPart part_shift_right(WordPart a, int n) {
  return _mm512_srlv_epi32(a, _mm512_set1_epi32(n));
}
LT_INLINE WordPart part_shift_left(WordPart a, int n) {
  return _mm512_sllv_epi32(a, _mm512_set1_epi32(n));
}
LT_INLINE WordPart part_signed_byte(WordPart a, int byte) {
  return _mm512_srai_epi32(part_shift_left(a, 24 - 8 * byte), 24);
}
LT_INLINE Vec part_to_float(WordPart a) { return {_mm512_cvtepi32_ps(a)}; }
template <int kLargest, int kCount>
LT_INLINE WordPart dots_part(WordPart sum, const WordPart (&code)[kCount], const int8_t* q) {
#pragma GCC unroll 8
  for (int g = 0; g < kCount; ++g) {
    sum = _mm512_dpbusd_epi32(sum, code[g], _mm512_set1_epi32(load_quad(q + 4 * g)));
  }
  return sum;
}

#elif defined(LT_ISA_AVX2)

using WordPart = __m256i;
// maddubs saturates for codes of 8 bits, so they go signed: |code - 128| times q with its sign.
template <int kLargest>
constexpr int kDotSubtracts = kLargest > 127 ? 128 : 0;
// As many words as 16 bits hold the products of are added there: madd widens them together.
template <int kLargest>
constexpr int kPairsThatFit = 32767 / (2 * 127 * kLargest);
template <int kLargest>
constexpr int kDotRun = kPairsThatFit<kLargest> >= 8   ? 8
                        : kPairsThatFit<kLargest> >= 4 ? 4
                        : kPairsThatFit<kLargest> >= 2 ? 2
                                                       : 1;

LT_INLINE WordPart part_load(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
LT_INLINE WordPart part_set(int32_t x) { return _mm256_set1_epi32(x); }
LT_INLINE WordPart part_look_up(const uint8_t (&table)[16], WordPart indices) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), indices);
}
LT_INLINE Vec part_look_up(const float (&table)[16], WordPart indices) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), indices);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), indices);
  const __m256i half = _mm256_slli_epi32(indices, 28);  // the fourth bit as the sign
  return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(half))};
}
LT_INLINE WordPart part_add(WordPart a, WordPart b) { return _mm256_add_epi32(a, b); }
LT_INLINE WordPart part_and(WordPart a, WordPart b) { return _mm256_and_si256(a, b); }
LT_INLINE WordPart part_or(WordPart a, WordPart b) { return _mm256_or_si256(a, b); }
LT_INLINE WordPart part_xor(WordPart a, WordPart b) { return _mm256_xor_si256(a, b); }
LT_INLINE WordPart part_shift_right(WordPart a, int n) {
  return _mm256_srlv_epi32(a, _mm256_set1_epi32(n));
}
LT_INLINE WordPart part_shift_left(WordPart a, int n) {
  return _mm256_sllv_epi32(a, _mm256_set1_epi32(n));
}
LT_INLINE WordPart part_signed_byte(WordPart a, int byte) {
  return _mm256_srai_epi32(part_shift_left(a, 24 - 8 * byte), 24);
}
LT_INLINE Vec part_to_float(WordPart a) { return {_mm256_cvtepi32_ps(a)}; }
template <int kLargest, int kCount>
LT_INLINE WordPart dots_part(WordPart sum, const WordPart (&code)[kCount], const int8_t* q) {
  constexpr int kRun = kDotRun<kLargest>;
#pragma GCC unroll 8
  for (int first = 0; first < kCount; first += kRun) {
    __m256i pairs = _mm256_setzero_si256();
    for (int g = first; g < first + kRun && g < kCount; ++g) {
      __m256i bytes = _mm256_set1_epi32(load_quad(q + 4 * g));
      __m256i codes = code[g];
      if constexpr (kLargest > 127) {
        const __m256i signed_codes = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
        bytes = _mm256_sign_epi8(bytes, signed_codes);
        codes = _mm256_abs_epi8(signed_codes);
      }
      const __m256i products = _mm256_maddubs_epi16(codes, bytes);
      pairs = g == first ? products : _mm256_add_epi16(pairs, products);
    }
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  return sum;
}

#else

typedef uint32_t WordPart __attribute__((vector_size(Vec::kLanes * sizeof(uint32_t))));
typedef int32_t SignedPart __attribute__((vector_size(Vec::kLanes * sizeof(int32_t))));
template <int kLargest>
constexpr int kDotSubtracts = 0;
template <int kLargest>
constexpr int kDotRun = 8;

LT_INLINE WordPart part_load(const uint8_t* p) {
  WordPart r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
LT_INLINE WordPart part_set(int32_t x) { return WordPart{} + static_cast<uint32_t>(x); }
LT_INLINE WordPart part_look_up(const uint8_t (&table)[16], WordPart indices) {
  uint8_t bytes[sizeof(WordPart)];
  std::memcpy(bytes, &indices, sizeof bytes);
  for (uint8_t& byte : bytes) byte = table[byte & 15];
  std::memcpy(&indices, bytes, sizeof bytes);
  return indices;
}
LT_INLINE Vec part_look_up(const float (&table)[16], WordPart indices) {
  float values[Vec::kLanes];
  for (int lane = 0; lane < Vec::kLanes; ++lane) values[lane] = table[indices[lane] & 15];
  return vec_load(values);
}
LT_INLINE WordPart part_add(WordPart a, WordPart b) { return a + b; }
LT_INLINE WordPart part_and(WordPart a, WordPart b) { return a & b; }
LT_INLINE WordPart part_or(WordPart a, WordPart b) { return a | b; }
LT_INLINE WordPart part_xor(WordPart a, WordPart b) { return a ^ b; }
LT_INLINE WordPart part_shift_right(WordPart a, int n) { return a >> n; }
LT_INLINE WordPart part_shift_left(WordPart a, int n) { return a << n; }
LT_INLINE WordPart part_signed_byte(WordPart a, int byte) {
  return (WordPart)((SignedPart)(a << (24 - 8 * byte)) >> 24);
}
LT_INLINE Vec part_to_float(WordPart a) {
  return {__builtin_convertvector((SignedPart)a, VecRegister)};
}
template <int kLargest, int kCount>
LT_INLINE WordPart dots_part(WordPart sum, const WordPart (&code)[kCount], const int8_t* q) {
  for (int g = 0; g < kCount; ++g) {
    for (int byte = 0; byte < 4; ++byte) {
      sum += (code[g] >> (8 * byte) & 0xff) * static_cast<uint32_t>(q[4 * g + byte]);
    }
  }
  return sum;
}

#endif

struct Words {
  WordPart v[kParts];
};

LT_INLINE Words words_load(const uint8_t* p) {
  Words r;
  LT_PARTS r.v[i] = part_load(p + i * static_cast<int>(sizeof(WordPart)));
  return r;
}
LT_INLINE Words words_set(int32_t x) {
  Words r;
  LT_PARTS r.v[i] = part_set(x);
  return r;
}
LT_INLINE Words operator&(Words a, Words b) {
  LT_PARTS a.v[i] = part_and(a.v[i], b.v[i]);
  return a;
}
LT_INLINE Words operator|(Words a, Words b) {
  LT_PARTS a.v[i] = part_or(a.v[i], b.v[i]);
  return a;
}
LT_INLINE Words operator^(Words a, Words b) {
  LT_PARTS a.v[i] = part_xor(a.v[i], b.v[i]);
  return a;
}
LT_INLINE Words operator>>(Words a, int n) {
  LT_PARTS a.v[i] = part_shift_right(a.v[i], n);
  return a;
}
LT_INLINE Words operator<<(Words a, int n) {
  LT_PARTS a.v[i] = part_shift_left(a.v[i], n);
  return a;
}
LT_INLINE Words operator+(Words a, Words b) {
  LT_PARTS a.v[i] = part_add(a.v[i], b.v[i]);
  return a;
}
LT_INLINE Words words_look_up(const uint8_t (&table)[16], Words indices) {
  LT_PARTS indices.v[i] = part_look_up(table, indices.v[i]);
  return indices;
}
LT_INLINE Floats floats_look_up(const float (&table)[16], Words indices) {
  Floats r;
  LT_PARTS r.v[i] = part_look_up(table, indices.v[i]);
  return r;
}
LT_INLINE Words words_signed_byte(Words a, int byte) {
  LT_PARTS a.v[i] = part_signed_byte(a.v[i], byte);
  return a;
}
LT_INLINE Floats words_to_float(Words a) {
  Floats r;
  LT_PARTS r.v[i] = part_to_float(a.v[i]);
  return r;
}
// One byte of each word, 0 .. 255, as a float.
LT_INLINE Floats byte_to_float(Words a, int byte) {
  return words_to_float(a >> (8 * byte) & words_set(0xff));
}
template <int kLargest, int kCount>
LT_INLINE Words dots_of(Words sum, const Words* code, const int8_t* q) {
  constexpr int kRun = kDotRun<kLargest> < kCount ? kDotRun<kLargest> : kCount;
#pragma GCC unroll 8
  for (int first = 0; first < kCount; first += kRun) {  // all parts meet a quad when it is loaded
    LT_PARTS {
      WordPart part[kRun];
#pragma GCC unroll 8
      for (int g = 0; g < kRun; ++g) part[g] = code[first + g].v[i];
      sum.v[i] = dots_part<kLargest>(sum.v[i], part, q + 4 * first);
    }
  }
  return sum;
}

#undef LT_PARTS

}  // namespace LT_ISA
}  // namespace llamatelemetry
