// What the CPU's attention kernels share: where rows lie, from dot product to score, and results.
// Few rows (decode): decode.h; many (prefill): prefill.h.
//
// The rows of a key head are the (query, head) pairs that share it: row r is query r / group_size,
// head r % group_size. Where they lie is told by a Source, one sequence and key head of an op:
//   T                               element type of queries and results
//   Stored                          element type of keys and values
//   kAsTheyLie                      whether rows are found where the cache has them, not in copies
//   kHasAlibi                       whether scores may lose slope(row) * |position(row) - key|
//   int64_t head_dim, num_rows(); ScoreRule rule;
//   const T* query(row)
//   KeyRange keys(row)              that the row sees; both ends grow with the row
//   KeyRange keys(begin, end)       that any of these rows sees, as far as the source goes
//   void find_keys(range, rows)     rows[i] = key row range.begin + i; find_values likewise
//   float slope(row), position(row)
//   float sink(row)                 a score without a value; -infinity: off
//   const void* result(row)         where finish writes
//   void finish(row, o, row_max, sum)  takes a result, see write_row
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention/params.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr float kNoScore =
    -3.4028234664e38f;          // below every finite score, and no NaN when subtracted
constexpr int kBlockKeys = 64;  // keys that are scored before their values are added

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int clamp_to(int64_t x, int limit) {
  return static_cast<int>(smaller(larger(x, 0), limit));
}

// Calls body with the integral constant n, 1 <= n <= kMax.
template <int kMax, typename Body>
LT_INLINE void with_constant(int n, Body&& body) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_constant<kMax - 1>(n, body);
  }
  body(std::integral_constant<int, kMax>{});
}

// Calls body with the Type of dtype. What has bfloat16's instructions is compiled for it alone.
template <typename Body>
void dispatch_level_dtype([[maybe_unused]] DType dtype, Body&& body) {
#if defined(__AVX512BF16__)
  body(Type<BFloat16>{});
#else
  dispatch_dtype(dtype, body);
#endif
}

// ---- Scores ----

struct ScoreRule {
  float softmax_scale;
  float softcap;  // 0: off
  bool has_alibi;
};

// Scores leave the dot product in log2 units (times log2 e), unless softcap has yet to be applied
// to them.
LT_INLINE float dot_factor(const ScoreRule& rule) {
  return rule.softcap > 0 ? rule.softmax_scale / rule.softcap : rule.softmax_scale * kLog2E;
}

LT_INLINE void apply_softcap(const ScoreRule& rule, float* scores, int64_t count) {
  if (rule.softcap == 0) return;
  for (int64_t i = 0; i < count; ++i) scores[i] = rule.softcap * kLog2E * tanhf(scores[i]);
}

// The state of a row before its first key: a sink is a score without a value.
LT_INLINE float first_row_max(float sink) {
  const float score = sink * kLog2E;
  return score < kNoScore ? kNoScore : score;  // a NaN stays
}
LT_INLINE float first_sum(float sink) { return sink == -INFINITY ? 0.0f : 1.0f; }

// ---- Rows ----

// Exponent 0 counts in 2^-9; the largest exponent with the largest mantissa is NaN.
LT_INLINE float e4m3_to_float(uint8_t x) {
  const uint32_t size = x & 0x7f;
  const float least = static_cast<float>(size) * 0.001953125f;
  uint32_t least_bits;
  std::memcpy(&least_bits, &least, sizeof least_bits);
  constexpr uint32_t kBias = (127 - 7) << 23;
  uint32_t bits = size < 8 ? least_bits : size == 0x7f ? 0x7fc00000 : (size << 20) + kBias;
  bits |= static_cast<uint32_t>(x & 0x80) << 24;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// dst[0..padded) = src[0..head_dim) * factor, then zeros.
template <typename T>
void load_row(const T* src, int64_t head_dim, float factor, float* dst, int64_t padded) {
  const Vec scale = vec_set(factor);
  int64_t c = 0;
  for (; c + Vec::kLanes <= head_dim; c += Vec::kLanes)
    vec_store(dst + c, vec_load(src + c) * scale);
  for (; c < head_dim; ++c) dst[c] = to_float(src[c]) * factor;
  for (; c < padded; ++c) dst[c] = 0.0f;
}

// o is not yet divided by sum; row_max and sum are of the scores in log2 units.
template <typename T>
void write_row(const float* o, float row_max, float sum, int64_t head_dim, T* out, float* lse) {
  const float factor = sum == 0 ? 0.0f : 1.0f / sum;
  int64_t c = 0;
  for (; c + Vec::kLanes <= head_dim; c += Vec::kLanes) {
    vec_store(out + c, vec_load(o + c) * vec_set(factor));
  }
  for (; c < head_dim; ++c) out[c] = from_float<T>(o[c] * factor);
  *lse = sum == 0 ? -INFINITY : row_max * kLn2 + logf(sum);
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
