// What the CPU's attention kernels share: from dot product to score, and few rows (decode), where
// lanes run along head_dim so that K and V are read once, as they lie. Many rows: tile_cpu.h.
//
// The rows of a key head are the (query, head) pairs that share it: row r is query r / group_size,
// head r % group_size. Where they lie is told by a Source, one sequence and key head of an op:
//   T                               element type
//   kHasAlibi                       whether scores may lose slope(row) * |position(row) - key|
//   int64_t head_dim, num_rows(); ScoreRule rule;
//   const T* query(row)
//   KeyRange keys(row)              that the row sees; both ends grow with the row
//   KeyRange keys(begin, end)       that any of these rows sees, as far as the source goes
//   void find_keys(range, rows)     rows[i] = key row range.begin + i; find_values likewise
//   float slope(row), position(row)
//   float sink(row)                 a score without a value; -infinity: off
//   const void* result(row)         where finish writes
//   void finish(row, o, largest, sum)  takes a result, see write_row
#pragma once

#include <cmath>
#include <type_traits>

#include "attention/params.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr float kNoScore =
    -3.4028234664e38f;          // below every finite score, and no NaN when subtracted
constexpr int kBlockKeys = 64;  // keys that are scored before their values are added
constexpr int kFewRows = 16;    // up to here lanes run along head_dim

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

// Scores leave the dot product in bits (times log2 e), unless softcap has yet to be applied to
// them.
LT_INLINE float dot_factor(const ScoreRule& rule) {
  return rule.softcap > 0 ? rule.softmax_scale / rule.softcap : rule.softmax_scale * kLog2E;
}

LT_INLINE void apply_softcap(const ScoreRule& rule, float* scores, int64_t count) {
  if (rule.softcap == 0) return;
  for (int64_t i = 0; i < count; ++i) scores[i] = rule.softcap * kLog2E * tanhf(scores[i]);
}

// The state of a row before its first key: a sink is a score without a value.
LT_INLINE float first_largest(float sink) {
  const float score = sink * kLog2E;
  return score < kNoScore ? kNoScore : score;  // a NaN stays
}
LT_INLINE float first_sum(float sink) { return sink == -INFINITY ? 0.0f : 1.0f; }

// ---- Rows ----

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

// o is not yet divided by sum; largest and sum are of the scores in bits.
template <typename T>
void write_row(const float* o, float largest, float sum, int64_t head_dim, T* out, float* lse) {
  const float factor = sum == 0 ? 0.0f : 1.0f / sum;
  int64_t c = 0;
  for (; c + Vec::kLanes <= head_dim; c += Vec::kLanes) {
    vec_store(out + c, vec_load(o + c) * vec_set(factor));
  }
  for (; c < head_dim; ++c) out[c] = from_float<T>(o[c] * factor);
  *lse = sum == 0 ? -INFINITY : largest * kLn2 + logf(sum);
}

// ---- Few rows ----

#if defined(LT_ISA_AVX512)
constexpr int kMaxRows = 4;  // rows that share each load of a key or value: what registers hold
#else
constexpr int kMaxRows = 2;
#endif

// scores[r][j] = q[r] . keys[j]. keys holds pointers up to a multiple of 4 past num_keys.
template <int kRows, typename T>
void score_few(const float* q, int64_t q_stride, const T* const* keys, int num_keys,
               int64_t head_dim, float* scores) {
  for (int j = 0; j < num_keys; j += 4) {
    Vec sum[kRows][4];
    for (auto& row : sum) {
      for (Vec& x : row) x = vec_set(0);
    }
    const auto add = [&](int64_t c, auto load) {
      Vec key[4];
      for (int u = 0; u < 4; ++u) key[u] = load(keys[j + u] + c);
      for (int r = 0; r < kRows; ++r) {
        const Vec query = vec_load(q + r * q_stride + c);
        for (int u = 0; u < 4; ++u) sum[r][u] = vec_fma(query, key[u], sum[r][u]);
      }
    };
    int64_t c = 0;
    for (; c + Vec::kLanes <= head_dim; c += Vec::kLanes) {
      add(c, [](const T* x) { return vec_load(x); });
    }
    if (const int left = static_cast<int>(head_dim - c); left > 0) {
      add(c, [left](const T* x) { return vec_load_first(x, left); });
    }
    for (int r = 0; r < kRows; ++r) {
      vec_sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kBlockKeys + j);
    }
  }
}

// o[r][c..] = o[r][c..] * scale[r] + sum_j p[r][j] values[j][c..], kVecs registers wide.
template <int kRows, int kVecs, typename T, typename Load>
LT_INLINE void add_values(const float* p, const float* scale, const T* const* values, int num_keys,
                          int64_t c, float* o, int64_t o_stride, Load load) {
  // A block is summed by itself: long sums round less that way.
  Vec sum[kRows][kVecs];
  for (auto& row : sum) {
    for (Vec& x : row) x = vec_set(0);
  }
  for (int j = 0; j < num_keys; ++j) {
    Vec value[kVecs];
    for (int v = 0; v < kVecs; ++v) value[v] = load(values[j] + c + v * Vec::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = vec_set(p[r * kBlockKeys + j]);
      for (int v = 0; v < kVecs; ++v) sum[r][v] = vec_fma(weight, value[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      float* to = o + r * o_stride + c + v * Vec::kLanes;
      vec_store(to, vec_fma(vec_load(to), vec_set(scale[r]), sum[r][v]));
    }
  }
}

template <int kRows, typename T>
void add_values_few(const float* p, const float* scale, const T* const* values, int num_keys,
                    int64_t head_dim, float* o, int64_t o_stride) {
  constexpr int kVecs = 4;
  const auto whole = [](const T* x) { return vec_load(x); };
  int64_t c = 0;
  for (; c + kVecs * Vec::kLanes <= head_dim; c += kVecs * Vec::kLanes) {
    add_values<kRows, kVecs>(p, scale, values, num_keys, c, o, o_stride, whole);
  }
  for (; c + Vec::kLanes <= head_dim; c += Vec::kLanes) {
    add_values<kRows, 1>(p, scale, values, num_keys, c, o, o_stride, whole);
  }
  if (const int left = static_cast<int>(head_dim - c); left > 0) {
    add_values<kRows, 1>(p, scale, values, num_keys, c, o, o_stride,
                         [left](const T* x) { return vec_load_first(x, left); });
  }
}

// Turns scores [begin, end) of a block into weights, those outside into 0; returns by how much the
// results of earlier blocks shrink.
LT_INLINE float weigh(float* scores, int begin, int end, int num_keys, float* largest, float* sum) {
  const int padded = static_cast<int>(round_up(num_keys, Vec::kLanes));
  for (int j = 0; j < begin; ++j) scores[j] = -INFINITY;
  for (int j = end; j < padded; ++j) scores[j] = -INFINITY;
  Vec peak = vec_set(*largest);
  for (int j = 0; j < padded; j += Vec::kLanes) peak = vec_max(vec_load(scores + j), peak);
  const float old = *largest;
  *largest = vec_reduce_max(peak);
  const Vec base = vec_set(*largest);
  Vec total = vec_set(0);
  for (int j = 0; j < padded; j += Vec::kLanes) {
    const Vec weight = vec_exp2(vec_load(scores + j) - base);
    vec_store(scores + j, weight);
    total = total + weight;
  }
  const float scale = exp2f(old - *largest);
  *sum = *sum * scale + vec_sum(total);
  return scale;
}

// Rows [begin, end) of a source, at most kFewRows.
template <typename Source>
void attend_few(const Source& source, int64_t begin, int64_t end) {
  using T = typename Source::T;
  const KeyRange keys = source.keys(begin, end);
  const int64_t head_dim = source.head_dim;
  alignas(64) float q[kFewRows * kMaxHeadDim];
  alignas(64) float o[kFewRows * kMaxHeadDim];
  float largest[kFewRows];
  float sum[kFewRows];
  const int64_t stride = round_up(head_dim, Vec::kLanes);
  const int num_rows = static_cast<int>(end - begin);
  for (int r = 0; r < num_rows; ++r) {
    load_row(source.query(begin + r), head_dim, dot_factor(source.rule), q + r * stride, stride);
    for (int64_t c = 0; c < stride; c += Vec::kLanes) vec_store(o + r * stride + c, vec_set(0));
    largest[r] = first_largest(source.sink(begin + r));
    sum[r] = first_sum(source.sink(begin + r));
  }
  const int num_parts = static_cast<int>(ceil_div(num_rows, kMaxRows));
  for (int64_t first = keys.begin; first < keys.end; first += kBlockKeys) {
    const KeyRange block{first, smaller(first + kBlockKeys, keys.end)};
    const int num_keys = static_cast<int>(block.end - block.begin);
    const T* key_rows[kBlockKeys];
    const T* value_rows[kBlockKeys];
    source.find_keys(block, key_rows);
    source.find_values(block, value_rows);
    for (int j = num_keys; j % 4 != 0; ++j) key_rows[j] = key_rows[num_keys - 1];
    for (int part = 0; part < num_parts; ++part) {
      const int row = num_rows * part / num_parts;
      with_constant<kMaxRows>(num_rows * (part + 1) / num_parts - row, [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        alignas(64) float scores[kRows * kBlockKeys];
        float scale[kRows];
        score_few<kRows>(q + row * stride, stride, key_rows, num_keys, head_dim, scores);
        for (int r = 0; r < kRows; ++r) {
          float* row_scores = scores + r * kBlockKeys;
          const int64_t index = begin + row + r;
          apply_softcap(source.rule, row_scores, num_keys);
          if constexpr (Source::kHasAlibi) {
            if (source.rule.has_alibi) {
              const float slope = source.slope(index) * kLog2E;
              const float distance = source.position(index) - static_cast<float>(first);
              for (int j = 0; j < num_keys; ++j) {
                row_scores[j] -= slope * std::fabs(distance - static_cast<float>(j));
              }
            }
          }
          const KeyRange seen = source.keys(index);
          scale[r] = weigh(row_scores, clamp_to(seen.begin - first, num_keys),
                           clamp_to(seen.end - first, num_keys), num_keys, &largest[row + r],
                           &sum[row + r]);
        }
        add_values_few<kRows>(scores, scale, value_rows, num_keys, head_dim, o + row * stride,
                              stride);
      });
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    source.finish(begin + r, o + r * stride, largest[r], sum[r]);
  }
}

template <typename Source>
void attend_rows(const Source& source) {
  const int64_t num_rows = source.num_rows();
  for (int64_t row = 0; row < num_rows; row += kFewRows) {
    attend_few(source, row, smaller(row + kFewRows, num_rows));
  }
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
