// products.h by AMX: blocks of 16 x 16 sums of words of two bfloat16. Compiled for level amx alone.
#pragma once

#include "attention/cpu/words.h"
#include "vec/amx.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr int kMaxTileRows = 768;  // at most: their q and o take 600 KB of cache
constexpr int kTileKeys = 256;     // a block: o is read and written once for all of them
constexpr int kStep = 16;          // keys, or elements of head_dim, of one product
constexpr int kSummed = 32;        // what is summed comes in multiples of these
constexpr int kValueWords = kTileKeys / 2;

// head_dim as products take it.
constexpr int64_t padded_dim(int64_t head_dim) { return round_up(head_dim, kSummed); }

// Values of keys [from, to) of a block as words [padded_dim, kValueWords]; a null row
// pointer stands for a row of zeros. What is
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

// scores = factor * keys . queries, of kStep keys; row_max takes them in.
template <int kPer, int kVecs>
LT_INLINE void score_keys(const float* keys, const float* q, int64_t depth, float factor,
                          float* scores, float* row_max) {
  static_assert(kPer == 2);
  constexpr int kColumns = kVecs * Vec::kLanes;
  amx_product<kVecs>(keys, kRowWords, q, kGroupRows, depth, scores, kColumns);
  for (int v = 0; v < kVecs; ++v) {
    Vec new_max = vec_load(row_max + v * Vec::kLanes);
    for (int i = 0; i < kStep; ++i) {
      float* score = scores + i * kColumns + v * Vec::kLanes;
      const Vec x = vec_load(score) * vec_set(factor);
      vec_store(score, x);
      new_max = vec_max(x, new_max);
    }
    vec_store(row_max + v * Vec::kLanes, new_max);
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

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
