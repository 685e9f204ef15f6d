// Few rows (decode) of a Source (source.h): lanes run along head_dim, so that K and V are read
// once, as they lie.                                    (online softmax: Milakov & Gimelshein 2018)
#pragma once

#include <cmath>

#include "attention/cpu/source.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

#if defined(LT_ISA_AVX512)
constexpr int kMaxSharedRows =
    4;  // rows that share each load of a key or value: what registers hold
#else
constexpr int kMaxSharedRows = 2;
#endif

// Asks for a row: those of a head lie apart, where the CPU's own prefetching seldom goes.
template <typename T>
LT_INLINE void fetch_row(const T* row, int64_t head_dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < head_dim; c += kLine) __builtin_prefetch(row + c, 0, 3);
}

// Rows that are fetched one by one beside other work, which is done before they are needed; none
// where kAny is false.
template <typename T, bool kAny>
struct Ahead {
  const T* const* rows;
  int count;
};
// Those of [begin, end) that there are.
template <typename T, bool kAny>
LT_INLINE void fetch_rows(Ahead<T, kAny> ahead, int begin, int end, int64_t head_dim) {
  if constexpr (kAny) {
    for (int i = begin; i < end && i < ahead.count; ++i) fetch_row(ahead.rows[i], head_dim);
  }
}

// scores[r][j] = q[r] . keys[j]. keys holds pointers up to a multiple of 4 past num_keys.
template <int kRows, typename T, bool kAny>
void score_few(const float* q, int64_t q_stride, const T* const* keys, int num_keys,
               int64_t head_dim, float* scores, Ahead<T, kAny> ahead) {
  for (int j = 0; j < num_keys; j += 4) {
    fetch_rows(ahead, j, j + 4, head_dim);
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
template <int kRows, int kVecs, typename T, bool kAny, typename Load>
LT_INLINE void add_values(const float* p, const float* scale, const T* const* values, int num_keys,
                          int64_t c, int64_t head_dim, float* o, int64_t o_stride,
                          Ahead<T, kAny> ahead, Load load) {
  // A block is summed by itself: long sums round less that way.
  Vec sum[kRows][kVecs];
  for (auto& row : sum) {
    for (Vec& x : row) x = vec_set(0);
  }
  for (int j = 0; j < num_keys; ++j) {
    fetch_rows(ahead, j, j + 1, head_dim);
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

template <int kRows, typename T, bool kAny>
void add_values_few(const float* p, const float* scale, const T* const* values, int num_keys,
                    int64_t head_dim, float* o, int64_t o_stride, Ahead<T, kAny> ahead) {
  constexpr int kVecs = 4;
  const auto add = [&](int64_t c, auto vecs, auto load) {
    add_values<kRows, decltype(vecs)::value>(p, scale, values, num_keys, c, head_dim, o, o_stride,
                                             ahead, load);
    ahead.count = 0;
  };
  const auto whole = [](const T* x) { return vec_load(x); };
  int64_t c = 0;
  for (; c + kVecs * Vec::kLanes <= head_dim; c += kVecs * Vec::kLanes) {
    add(c, std::integral_constant<int, kVecs>{}, whole);
  }
  constexpr std::integral_constant<int, 1> kOne{};
  for (; c + Vec::kLanes <= head_dim; c += Vec::kLanes) add(c, kOne, whole);
  if (const int left = static_cast<int>(head_dim - c); left > 0) {
    add(c, kOne, [left](const T* x) { return vec_load_first(x, left); });
  }
}

// Turns scores [begin, end) of a block into weights, those outside into 0; returns by how much the
// results of earlier blocks shrink.
LT_INLINE float exponentiate(float* scores, int begin, int end, int num_keys, float* row_max,
                             float* sum) {
  const int padded = static_cast<int>(round_up(num_keys, Vec::kLanes));
  for (int j = 0; j < begin; ++j) scores[j] = -INFINITY;
  for (int j = end; j < padded; ++j) scores[j] = -INFINITY;
  Vec peak = vec_set(*row_max);
  for (int j = 0; j < padded; j += Vec::kLanes) peak = vec_max(vec_load(scores + j), peak);
  const float old = *row_max;
  *row_max = vec_reduce_max(peak);
  const Vec base = vec_set(*row_max);
  Vec total = vec_set(0);
  for (int j = 0; j < padded; j += Vec::kLanes) {
    const Vec weight = vec_exp2(vec_load(scores + j) - base);
    vec_store(scores + j, weight);
    total = total + weight;
  }
  const float scale = exp2f(old - *row_max);
  *sum = *sum * scale + vec_sum(total);
  return scale;
}

// Rows [begin, end) of a source, at most kMaxDecodeRows.
template <typename Source>
void attend_few(const Source& source, int64_t begin, int64_t end) {
  using Stored = typename Source::Stored;
  using Rows = Ahead<Stored, Source::kAsTheyLie>;
  const KeyRange keys = source.keys(begin, end);
  const int64_t head_dim = source.head_dim;
  alignas(64) float q[kMaxDecodeRows * kMaxHeadDim];
  alignas(64) float o[kMaxDecodeRows * kMaxHeadDim];
  float row_max[kMaxDecodeRows];
  float sum[kMaxDecodeRows];
  const int64_t stride = round_up(head_dim, Vec::kLanes);
  const int num_rows = static_cast<int>(end - begin);
  for (int r = 0; r < num_rows; ++r) {
    load_row(source.query(begin + r), head_dim, dot_factor(source.rule), q + r * stride, stride);
    for (int64_t c = 0; c < stride; c += Vec::kLanes) vec_store(o + r * stride + c, vec_set(0));
    row_max[r] = first_row_max(source.sink(begin + r));
    sum[r] = first_sum(source.sink(begin + r));
  }
  const int num_parts = static_cast<int>(ceil_div(num_rows, kMaxSharedRows));
  // Values are fetched beside their keys' scores, keys beside the values of the block before.
  const Stored* next_rows[kBlockKeys];
  for (int64_t first = keys.begin; first < keys.end; first += kBlockKeys) {
    const KeyRange block{first, smaller(first + kBlockKeys, keys.end)};
    const int num_keys = static_cast<int>(block.end - block.begin);
    const Stored* key_rows[kBlockKeys];
    const Stored* value_rows[kBlockKeys];
    source.find_keys(block, key_rows);
    source.find_values(block, value_rows);
    const KeyRange next{block.end, smaller(block.end + kBlockKeys, keys.end)};
    if constexpr (Source::kAsTheyLie) source.find_keys(next, next_rows);
    for (int j = num_keys; j % 4 != 0; ++j) key_rows[j] = key_rows[num_keys - 1];
    for (int part = 0; part < num_parts; ++part) {
      const int row = num_rows * part / num_parts;
      with_constant<kMaxSharedRows>(num_rows * (part + 1) / num_parts - row, [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        alignas(64) float scores[kRows * kBlockKeys];
        float scale[kRows];
        score_few<kRows>(q + row * stride, stride, key_rows, num_keys, head_dim, scores,
                         Rows{value_rows, part == 0 ? num_keys : 0});
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
          scale[r] = exponentiate(row_scores, clamp_to(seen.begin - first, num_keys),
                                  clamp_to(seen.end - first, num_keys), num_keys, &row_max[row + r],
                                  &sum[row + r]);
        }
        add_values_few<kRows>(
            scores, scale, value_rows, num_keys, head_dim, o + row * stride, stride,
            Rows{next_rows, part == 0 ? static_cast<int>(next.end - next.begin) : 0});
      });
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    source.finish(begin + r, o + r * stride, row_max[r], sum[r]);
  }
}

template <typename Source>
void attend_rows(const Source& source) {
  const int64_t num_rows = source.num_rows();
  for (int64_t row = 0; row < num_rows; row += kMaxDecodeRows) {
    attend_few(source, row, smaller(row + kMaxDecodeRows, num_rows));
  }
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
