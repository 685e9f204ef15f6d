// Online softmax over the accumulators of a warpgroup product: a thread holds two rows of 64, eight
// apart, and of each the columns 8 * j + 2 * (lane % 4) + {0, 1}.
#pragma once

#include <cstdint>

#include "attention/params.h"
#include "attention/sm90/key_blocks.cuh"
#include "common/dtype.h"
#include "ptx/math.cuh"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

// The row_max of a row that has seen no score: below every other, and finite.
constexpr float kNoRowMax = -1e30f;
// row_max is stale by design: a row keeps the maximum that its first scores gave it until a
// thread's weights of a block add up to more than this. So a block is exponentiated without looking
// for its largest score first, and accumulators are rescaled only when it matters. float16 bounds
// it by what the weights are packed to; bfloat16 holds more, but results in float32 leave values
// only what weights leave of its range.
template <typename T>
constexpr float kMaxWeightSum = 0x1p24f;
template <>
constexpr float kMaxWeightSum<Half> = 0x1p14f;
// Past this the rescale factor underflows float32, so the scores are recomputed
// (multiply_keys_again).
constexpr float kLostWeight = 0x1p120f;
__device__ inline bool quad_any(bool x) {
  return (__ballot_sync(0xffffffff, x) >> (threadIdx.x % 32 / 4 * 4) & 0xf) != 0;
}

// The two rows of a thread. What becomes of a row depends on its own scores alone, not on the other
// rows of its warp: they may be another sequence's.
struct TwoRows {
  float row_max[2];  // in log2 units
  float sum[2];      // the thread's share of it
  bool always[2];    // whether row_max is raised before each block is exponentiated
  __device__ bool raises(int h) const { return always[h] || row_max[h] == kNoRowMax; }
  __device__ bool any_raises() const { return __any_sync(0xffffffff, raises(0) || raises(1)); }
};

// From dot products to scores in log2 units, as score_of. The first three as in Sm90Params.
struct ScoreTerms {
  float scale_log2;
  float cap_log2;
  float cap_rate;
  float slope;
};
template <int kBlockN>
__device__ inline void apply_score_terms(float (&s)[kBlockN / 2], const ScoreTerms& rule,
                                         int position, int first_key) {
  if (rule.cap_rate != 0.0f) {
    // tanh(x) = 1 - 2 / (e^2x + 1): off by 1e-7 of the cap, where tanh.approx is off by 5e-4.
    const float cap = rule.cap_log2;
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) {
      s[i] = cap - __fdividef(2.0f * cap, ptx::exp2_approx(s[i] * rule.cap_rate) + 1.0f);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) s[i] *= rule.scale_log2;
  }
  if (rule.slope != 0.0f) {
    const float slope = rule.slope * kLog2E;
    const auto first = static_cast<float>(position - first_key);  // exact up to 2^24
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) {
      const auto offset = static_cast<float>(i % 4 / 2 * 8 - i / 4 * 8 - i % 2);
      s[i] = fmaf(-slope, fabsf(first + offset), s[i]);
    }
  }
}

// A bit for each of a thread's columns of a block: those before end, where end counts from its
// first.
__device__ inline uint32_t columns_before(int end) {
  const auto columns = static_cast<uint32_t>(max(end, 0));
  return ptx::low_bits(columns / 8 * 2 + min(columns % 8, 2u));
}

// Scores of keys that a row does not see become -inf. ends and begins count from the thread's
// column 0 of the block.
template <MaskKind kMask, int kBlockN>
__device__ inline void mask_scores(float (&s)[kBlockN / 2], const int (&begins)[2],
                                   const int (&ends)[2]) {
  static_assert(kBlockN / 4 <= 32);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    uint32_t seen = columns_before(ends[row]);
    if constexpr (kMask == MaskKind::kLocal) seen &= ~columns_before(begins[row]);
#pragma unroll
    for (int column = 0; column < kBlockN / 4; ++column) {
      float& score = s[column / 2 * 4 + 2 * row + column % 2];
      score = seen >> column & 1 ? score : -INFINITY;
    }
  }
}

// The largest of a thread's and its neighbours' scores or weights in its row h.
template <int kBlockN>
__device__ inline float max_of_row(const float (&s)[kBlockN / 2], int h) {
  float even = s[2 * h];  // two chains of maxima
  float odd = s[2 * h + 1];
#pragma unroll
  for (int j = 1; j < kBlockN / 8; ++j) {
    even = fmaxf(even, s[4 * j + 2 * h]);
    odd = fmaxf(odd, s[4 * j + 2 * h + 1]);
  }
  return quad_reduce<Max>(fmaxf(even, odd));
}

// Raises the row maxima, of rows that do so, to the largest of these scores. rescale: by how much
// what was accumulated so far is to be scaled.
template <int kBlockN>
__device__ inline void raise_row_max(const float (&s)[kBlockN / 2], TwoRows& rows, float scale_log2,
                                     float (&rescale)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float largest = max_of_row<kBlockN>(s, h) * scale_log2;
    const bool moves = rows.raises(h) && largest > rows.row_max[h] + kRescaleSlack;
    const float row_max = moves ? largest : rows.row_max[h];
    rescale[h] = ptx::exp2_approx(rows.row_max[h] - row_max);
    rows.row_max[h] = row_max;
    rows.sum[h] *= rescale[h];
  }
}

template <int kBlockN>
__device__ inline float sum_of_row(const float (&s)[kBlockN / 2], int h) {
  float even = s[2 * h];
  float odd = s[2 * h + 1];
#pragma unroll
  for (int j = 1; j < kBlockN / 8; ++j) {
    even += s[4 * j + 2 * h];
    odd += s[4 * j + 2 * h + 1];
  }
  return even + odd;
}

// Scores to weights in place. totals: what a thread's weights of each row add up to.
template <int kBlockN>
__device__ inline void exponentiate(float (&s)[kBlockN / 2], const TwoRows& rows, float scale_log2,
                                    float (&totals)[2]) {
#pragma unroll
  for (int i = 0; i < kBlockN / 2; ++i) {
    s[i] = ptx::exp2_approx(fmaf(s[i], scale_log2, -rows.row_max[i % 4 / 2]));
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) totals[h] = sum_of_row<kBlockN>(s, h);
}

// Of rows whose weights are too large, but finite: raises the row maxima by the weights' exponents,
// and scales weights and totals down by as much.
template <int kBlockN>
__device__ inline void shrink_weights(float (&s)[kBlockN / 2], TwoRows& rows, float (&totals)[2],
                                      const bool (&shrinks)[2], float (&rescale)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    constexpr int kMantissaBits = 23;
    constexpr int kOne = 127;  // the exponent of 1
    const int exponent = (__float_as_int(max_of_row<kBlockN>(s, h)) >> kMantissaBits) - kOne;
    const float row_max = rows.row_max[h] + (shrinks[h] ? static_cast<float>(exponent) : 0.0f);
    const float factor = ptx::exp2_approx(rows.row_max[h] - row_max);  // as it was rounded
    rows.row_max[h] = row_max;
    rows.sum[h] *= factor;
    totals[h] *= factor;
    rescale[h] *= factor;
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
      s[4 * j + 2 * h] *= factor;
      s[4 * j + 2 * h + 1] *= factor;
    }
  }
}

// Of rows whose weights float32 lost: their scores, which stand here again, to weights of raised
// row maxima.
template <int kBlockN>
__device__ inline void exponentiate_lost(float (&s)[kBlockN / 2], TwoRows& rows, float scale_log2,
                                         float (&totals)[2], const bool (&lost)[2],
                                         float (&rescale)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float largest = max_of_row<kBlockN>(s, h) * scale_log2;
    const float raised = fmaxf(rows.row_max[h], largest);
    const float row_max = lost[h] ? raised : rows.row_max[h];
    const float factor = ptx::exp2_approx(rows.row_max[h] - row_max);
    rows.row_max[h] = row_max;
    rows.sum[h] *= factor;
    rescale[h] *= factor;
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = s[4 * j + 2 * h + e];
        const float weight = ptx::exp2_approx(fmaf(score, scale_log2, -row_max));
        score = lost[h] ? weight : score;
      }
    }
    const float total = sum_of_row<kBlockN>(s, h);
    totals[h] = lost[h] ? total : totals[h];
  }
}

// The weights as the A fragments of the next product.
template <typename T, int kBlockN>
__device__ inline void pack_weights(const float (&s)[kBlockN / 2], uint32_t (&p)[kBlockN / 16][4]) {
#pragma unroll
  for (int step = 0; step < kBlockN / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[step][i] = pack_two(s[8 * step + 2 * i], s[8 * step + 2 * i + 1], T{});
    }
  }
}

template <int kSize>
__device__ inline void rescale_rows(float (&o)[kSize], const float (&rescale)[2]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) o[i] *= rescale[i % 4 / 2];
}

}  // namespace llamatelemetry
