// The two products of a tile (prefill.h): lanes are rows, so that scores need no horizontal sums
// and keys no transposing. They run on words (words.h); sums are float. Level amx: products_amx.h.
#pragma once

#include "attention/cpu/words.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr int kMaxTileRows = 384;  // at most: their q and o take 384 KB of cache
constexpr int kTileKeys = kBlockKeys;
constexpr int kPanel = 4;  // keys, then elements of head_dim, that share each load of rows
constexpr int kStep = kPanel;
constexpr int kSummed = kPanel;
// Unrolled, so that sums stay in registers.
#define LT_PANEL _Pragma("GCC unroll 4") for (int i = 0; i < kPanel; ++i)

constexpr int64_t padded_dim(int64_t head_dim) { return head_dim; }

// Values of keys [from, to) of a block as words [kTileKeys / kPerWord, kRowWords]; a null row
// pointer stands for a row of zeros.
template <typename T>
void pack_values(const T* const* rows, int from, int to, int64_t head_dim, float* values) {
  static constexpr T kZeros[kMaxHeadDim] = {};
  for (int j = from; j < to; j += kPerWord<T>) {
    const T* row = rows[j] ? rows[j] : kZeros;
    float* words = values + j / kPerWord<T> * kRowWords;
#if defined(__AVX512BF16__)
    vec_interleave(row, rows[j + 1] ? rows[j + 1] : kZeros, head_dim, words);
#else
    load_row(row, head_dim, 1.0f, words, 0);
#endif
  }
}

// sum + a * b, summed over the elements of each word.
template <int kPer>
LT_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
#if defined(__AVX512BF16__)
  if constexpr (kPer == 2) return vec_dot_pairs(a, b, sum);
#endif
  return vec_fma(a, b, sum);
}

// sum[i][v] = the sum over k < depth of a[i * a_row + k * a_step] * b[k * b_step + v * kLanes ...].
template <int kPer, int kVecs>
LT_INLINE void multiply_panel(const float* a, int64_t a_row, int64_t a_step, const float* b,
                              int64_t b_step, int64_t depth, Vec (&sum)[kPanel][kVecs]) {
  LT_PANEL for (int v = 0; v < kVecs; ++v) sum[i][v] = vec_set(0);
  for (int64_t k = 0; k < depth; ++k) {
    Vec rows[kVecs];
    for (int v = 0; v < kVecs; ++v) rows[v] = vec_load(b + k * b_step + v * Vec::kLanes);
    LT_PANEL {
      const Vec x = vec_set(a[i * a_row + k * a_step]);
      for (int v = 0; v < kVecs; ++v) sum[i][v] = multiply_add<kPer>(x, rows[v], sum[i][v]);
    }
  }
}

// scores = factor * keys . queries, of kStep keys; row_max takes them in. q of floats has the
// factor already.
template <int kPer, int kVecs>
LT_INLINE void score_keys(const float* keys, const float* q, int64_t depth, float factor,
                          float* scores, float* row_max) {
  constexpr int64_t kDepth = 32 * kPer;  // summed by itself: long sums round less that way
  Vec sum[kPanel][kVecs];
  multiply_panel<kPer>(keys, kRowWords, 1, q, kGroupRows, smaller(kDepth, depth), sum);
  for (int64_t c = kDepth; c < depth; c += kDepth) {
    Vec part[kPanel][kVecs];
    multiply_panel<kPer>(keys + c, kRowWords, 1, q + c * kGroupRows, kGroupRows,
                         smaller(kDepth, depth - c), part);
    LT_PANEL for (int v = 0; v < kVecs; ++v) sum[i][v] = sum[i][v] + part[i][v];
  }
  LT_PANEL for (int v = 0; v < kVecs; ++v) {
    const Vec x = kPer > 1 ? sum[i][v] * vec_set(factor) : sum[i][v];
    vec_store(scores + (i * kVecs + v) * Vec::kLanes, x);
    float* new_max = row_max + v * Vec::kLanes;
    vec_store(new_max, vec_max(x, vec_load(new_max)));
  }
}

// o = o * scale + values . weights, of keys [begin, end).
template <int kPer, int kVecs>
LT_INLINE void add_values(const float* values, int64_t head_dim, int begin, int end,
                          const float* weights, const Vec (&scale)[kVecs], float* o) {
  constexpr int kColumns = kVecs * Vec::kLanes;
  for (int64_t c = 0; c < head_dim; c += kPanel) {
    Vec sum[kPanel][kVecs];
    multiply_panel<kPer>(values + begin / kPer * kRowWords + c, 1, kRowWords,
                         weights + begin / kPer * kColumns, kColumns, (end - begin) / kPer, sum);
    LT_PANEL for (int v = 0; v < kVecs; ++v) {
      float* to = o + (c + i) * kGroupRows + v * Vec::kLanes;
      vec_store(to, vec_fma(vec_load(to), scale[v], sum[i][v]));
    }
  }
}

#undef LT_PANEL

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
