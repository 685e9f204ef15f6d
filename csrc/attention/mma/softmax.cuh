// Scores, masks and the online softmax over the accumulators of mma.sync.
//
// Fragments: of a 16 x 8 tile of accumulators lane l holds rows l / 4 (elements 0, 1) and l / 4 + 8
// (elements 2, 3), columns l % 4 * 2 and the next. kRowTiles such tiles stand one under the other.
#pragma once

#include <cfloat>
#include <cstdint>

#include "attention/mma/grid.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

template <int kRowTiles, int kKeyTiles, typename Each>
__device__ inline void for_each_score(float (&s)[kRowTiles][kKeyTiles][4], Each each) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) each(s[r][t][e], r, t, e);
    }
  }
}

// From dot products to scores in log2 units, where needs_score_rule says so.
template <int kRowTiles, int kKeyTiles>
__device__ inline void apply_score_rule(float (&s)[kRowTiles][kKeyTiles][4],
                                        const AttentionParams& p, const MmaWork& work,
                                        int first_row, int first_key) {
  const int lane = threadIdx.x % kWarpSize;
  const float slope = p.alibi_slopes == nullptr
                          ? 0.0f
                          : kLog2E * p.alibi_slopes[work.index * p.alibi_batch_stride + work.head];
  const int key = first_key + lane % 4 * 2;
  if (p.softcap > 0) {
    // tanh(x) = 1 - 2 / (e^2x + 1), right at both ends too
    const float into_cap = __fdividef(2 * kLog2E * p.softmax_scale, p.softcap);
    for_each_score(s, [&](float& score, int, int, int) {
      const float power = ptx::exp2_approx(score * into_cap);
      score = kLog2E * p.softcap - kLog2E * p.softcap * __fdividef(2.0f, power + 1.0f);
    });
  } else {
    const float scale = kLog2E * p.softmax_scale;
    for_each_score(s, [&](float& score, int, int, int) { score *= scale; });
  }
  if (slope == 0) return;
  const int distance = work.num_keys - work.num_queries + first_row + lane / 4 - key;
  for_each_score(s, [&](float& score, int r, int t, int e) {
    score -= slope * fabsf(static_cast<float>(distance + 16 * r + e / 2 * 8 - 8 * t - e % 2));
  });
}

// -infinity where the row does not see the key.
template <int kRowTiles, int kKeyTiles>
__device__ inline void mask_scores(float (&s)[kRowTiles][kKeyTiles][4], const AttentionParams& p,
                                   const MmaWork& work, int first_row, int first_key) {
  const int lane = threadIdx.x % kWarpSize;
  const int column = first_key + lane % 4 * 2;
  auto row = static_cast<uint32_t>(first_row + lane / 4);
  ptx::keep(row);  // few tiles are masked: the bounds should not wait in registers for them
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const KeyRange keys = work.keys_of_row(p, static_cast<int>(row) + 16 * r + 8 * half);
      const auto begin = static_cast<int>(keys.begin);
      const auto count = static_cast<unsigned>(keys.end - keys.begin);
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool seen = static_cast<unsigned>(column + 8 * t + e - begin) < count;
          if (!seen) s[r][t][2 * half + e] = -INFINITY;
        }
      }
    }
  }
}

// Scores s become weights 2^(s * scale_log2 - row_max).   (conditional rescale: FlashAttention-4)
template <int kRowTiles>
struct OnlineSoftmax {
  static constexpr unsigned kAllLanes = 0xffffffff;

  float row_max[kRowTiles][2];  // below every score until the row sees a key
  float sum[kRowTiles][2];      // of this lane's columns

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      row_max[r][0] = row_max[r][1] = -FLT_MAX;
      sum[r][0] = sum[r][1] = 0;
    }
  }

  // Raises row_max where a score is well above it. Which other rows the warp holds decides whether
  // it looks, not what a row gets.
  template <int kKeyTiles, int kDimTiles>
  __device__ void raise(const float (&s)[kRowTiles][kKeyTiles][4], float scale_log2,
                        float (&o)[kRowTiles][kDimTiles][4]) {
    float top[kRowTiles][2];  // of this lane's columns
    bool rises = false;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float value = fmaxf(s[r][0][2 * half], s[r][0][2 * half + 1]);
#pragma unroll
        for (int t = 1; t < kKeyTiles; ++t) {
          value = fmaxf(value, fmaxf(s[r][t][2 * half], s[r][t][2 * half + 1]));
        }
        top[r][half] = value * scale_log2;
        rises |= top[r][half] - kRescaleSlack > row_max[r][half];
      }
    }
    if (!__any_sync(kAllLanes, rises)) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float row_top = quad_reduce<Max>(top[r][half]);
        const float now = row_top - kRescaleSlack > row_max[r][half] ? row_top : row_max[r][half];
        const float scale = ptx::exp2_approx(row_max[r][half] - now);  // 1 where nothing changes
        row_max[r][half] = now;
        sum[r][half] *= scale;
#pragma unroll
        for (int t = 0; t < kDimTiles; ++t) {
          o[r][t][2 * half] *= scale;
          o[r][t][2 * half + 1] *= scale;
        }
      }
    }
  }

  // The 16 columns of tiles `tile` and the next as a fragment a of the product with the values.
  template <typename T, int kKeyTiles>
  __device__ void exponentiate(const float (&s)[kRowTiles][kKeyTiles][4], float scale_log2,
                               int tile, uint32_t (&weights)[kRowTiles][4]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* two = s[r][tile + t] + 2 * half;
          const float a = ptx::exp2_approx(fmaf(two[0], scale_log2, -row_max[r][half]));
          const float b = ptx::exp2_approx(fmaf(two[1], scale_log2, -row_max[r][half]));
          sum[r][half] += a + b;
          weights[r][2 * t + half] = pack_two(a, b, T{});
        }
      }
    }
  }
};

}  // namespace llamatelemetry
