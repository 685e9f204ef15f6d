// The two products of a tile (tile_cpu.h): lanes are rows, so that scores need no horizontal sums
// and keys no transposing. They run on words of 32 bits: one float; or, where the level has it, two
// neighbouring bfloat16 of the dimension that is summed over. Sums are float.
#pragma once

#include "attention/rows_cpu.h"
#include "vec/amx.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr int kPanelVecs = 3;  // registers of rows in a group; AVX-512 holds two panels of sums
constexpr int kGroupRows = kPanelVecs * Vec::kLanes;
constexpr int kRowWords = kMaxHeadDim + 16;  // between packed rows: no power of two

// Elements in a word.
template <typename T>
constexpr int kPerWord = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int kPerWord<BFloat16> = 2;
#endif

#if defined(__AMX_BF16__)

constexpr int kTileRows = 768;  // at most: their q and o take 600 KB of cache
constexpr int kTileKeys = 256;  // a block: o is read and written once for all of them
constexpr int kStep = 16;       // keys, or elements of head_dim, of one product
constexpr int kSummed = 32;     // what is summed comes in multiples of these
constexpr int kValueWords = kTileKeys / 2;

// head_dim as products take it.
constexpr int64_t padded_dim(int64_t head_dim) { return round_up(head_dim, kSummed); }

// Values of keys [from, to) of a block as words [padded_dim, kValueWords]; no row is zeros. What is
// past head_dim is not written: it goes to elements of o that no result holds.
template <typename T>
void pack_values(const T* const* rows, int from, int to, int64_t head_dim, float* values) {
  static constexpr BFloat16 kZeros[kMaxHeadDim] = {};
  constexpr int kPairs = 16;
  alignas(64) float pairs[kPairs * kRowWords];
  for (int first = from; first < to; first += 2 * kPairs) {
    for (int j = first; j < first + 2 * kPairs; j += 2) {
      vec_interleave(rows[j] ? rows[j] : kZeros, rows[j + 1] ? rows[j + 1] : kZeros, head_dim,
                     pairs + (j - first) / 2 * kRowWords);
    }
    vec_transpose(pairs, kRowWords, kPairs, head_dim, values + first / 2, kValueWords);
  }
}

// scores = factor * keys . queries, of kStep keys; largest takes them in.
template <int kPer, int kVecs>
LT_INLINE void score_keys(const float* keys, const float* q, int64_t depth, float factor,
                          float* scores, float* largest) {
  static_assert(kPer == 2);
  constexpr int kColumns = kVecs * Vec::kLanes;
  amx_product<kVecs>(keys, kRowWords, q, kGroupRows, depth, scores, kColumns);
  for (int v = 0; v < kVecs; ++v) {
    Vec most = vec_load(largest + v * Vec::kLanes);
    for (int i = 0; i < kStep; ++i) {
      float* score = scores + i * kColumns + v * Vec::kLanes;
      const Vec x = vec_load(score) * vec_set(factor);
      vec_store(score, x);
      most = vec_max(x, most);
    }
    vec_store(largest + v * Vec::kLanes, most);
  }
}

// o = o * scale + values . weights, of keys [begin, end).
template <int kPer, int kVecs>
LT_INLINE void add_values(const float* values, int64_t head_dim, int begin, int end,
                          const float* weights, const Vec (&scale)[kVecs], float* o) {
  constexpr int kColumns = kVecs * Vec::kLanes;
  alignas(64) float sums[kStep * kColumns];
  for (int64_t c = 0; c < head_dim; c += kStep) {
    amx_product<kVecs>(values + c * kValueWords + begin / kPer, kValueWords,
                       weights + begin / kPer * kColumns, kColumns, (end - begin) / kPer, sums,
                       kColumns);
    for (int i = 0; i < kStep; ++i) {
      for (int v = 0; v < kVecs; ++v) {
        float* to = o + (c + i) * kGroupRows + v * Vec::kLanes;
        const Vec sum = vec_load(sums + i * kColumns + v * Vec::kLanes);
        vec_store(to, vec_fma(vec_load(to), scale[v], sum));
      }
    }
  }
}

#else

constexpr int kTileRows = 384;  // at most: their q and o take 384 KB of cache
constexpr int kTileKeys = kBlockKeys;
constexpr int kPanel = 4;  // keys, then elements of head_dim, that share each load of rows
constexpr int kStep = kPanel;
constexpr int kSummed = kPanel;
// Unrolled, so that sums stay in registers.
#define LT_PANEL _Pragma("GCC unroll 4") for (int i = 0; i < kPanel; ++i)

constexpr int64_t padded_dim(int64_t head_dim) { return head_dim; }

// Values of keys [from, to) of a block as words [kTileKeys / kPerWord, kRowWords]; no row is zeros.
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

// scores = factor * keys . queries, of kStep keys; largest takes them in. q of floats has the
// factor already.
template <int kPer, int kVecs>
LT_INLINE void score_keys(const float* keys, const float* q, int64_t depth, float factor,
                          float* scores, float* largest) {
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
    float* most = largest + v * Vec::kLanes;
    vec_store(most, vec_max(x, vec_load(most)));
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
#endif

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
