// A row of logits as the blocks of the sampling kernels see it: where its workspace lies, what its
// tokens score and what weight they have, and which bin of scores they are in.
#pragma once

#include <cstdint>

#include "sampling/block_select.cuh"
#include "sampling/row.h"
#include "sampling/workspace.cuh"
#include "tile/vector.cuh"

namespace llamatelemetry::sampling {

static_assert(kSlice == kBlockValues);
static_assert(kMaxVocabSize <= int64_t{kSlice} * kBlockValues, "draw scans the slices once");

constexpr float kBinsPerUnit = 32.0f;
static_assert(kNumBins == -kSmallestScore * kBinsPerUnit);
constexpr int kBinsPerThread = (kNumBins + kNumThreads - 1) / kNumThreads;

// Up to this top_k all tokens that may be kept are candidates, and bins need no weight. Below
// kSlice: where top-k is off, top_k is the size of a vocabulary of more slices than one.
constexpr int kMaxListedTopK = 1024;

__device__ inline uint32_t rank_of(float score) {
  return rank_of_bits(__float_as_uint(score + 0.0f));
}
// The float that has this rank.
__device__ inline float score_of_rank(uint32_t rank) {
  return __uint_as_float(rank & 0x80000000 ? rank : ~rank & 0x7fffffff);
}

// A token and its logit in one number, larger for a larger logit, then for a lower id; 0 for NaN.
__device__ inline Weight packed_logit(float logit, int id) {
  return logit == logit ? Weight{~rank_of(logit)} << 32 | ~static_cast<uint32_t>(id) : 0;
}
__device__ inline float logit_of_packed(Weight packed) {
  return score_of_rank(~static_cast<uint32_t>(packed >> 32));
}
__device__ inline int64_t token_of_packed(Weight packed) {
  return packed == 0 ? 0 : ~static_cast<uint32_t>(packed);
}

// What top-k and top-p keep: ranks below last_rank, and of those equal to it ids from first_equal.
struct Kept {
  uint32_t last_rank = 0xffffffff;
  int first_equal = 0;

  __device__ bool holds(uint32_t rank, int id) const {
    return rank < last_rank || (rank == last_rank && id >= first_equal);
  }
};

template <typename T>
struct Row : SampleRow {
  const T* logits;
  int vocab_size;
  float best = 0.0f;  // score
  int64_t seed;       // read with the other parameters, although only the draw needs them
  int64_t offset;
  SampleRowState* state;
  Weight* bin_weights;
  Weight* slice_largest;  // packed
  Weight* slice_weights;
  uint32_t* bin_counts;
  int32_t* candidates;

  __device__ Row(const SampleParams& p, int64_t row)
      : SampleRow(sample_row(p, row)), seed(p.seed[row]), offset(p.offset[row]) {
    logits = static_cast<const T*>(p.logits) + row * p.logits_row_stride;
    vocab_size = static_cast<int>(p.vocab_size);
    char* workspace = static_cast<char*>(p.workspace);
    state = reinterpret_cast<SampleRowState*>(workspace + row * row_workspace_bytes(vocab_size));
    bin_weights = reinterpret_cast<Weight*>(state + 1);
    slice_largest = bin_weights + kNumBins;
    slice_weights = slice_largest + slices();
    bin_counts = reinterpret_cast<uint32_t*>(slice_weights + slices());
    candidates = reinterpret_cast<int32_t*>(bin_counts + kNumBins);
  }

  __device__ int slices() const { return (vocab_size + kSlice - 1) / kSlice; }
  __device__ bool top_k_on() const { return top_k < vocab_size; }
  __device__ bool bins_have_weights() const { return top_p_on && top_k > kMaxListedTopK; }

  // True where the largest logit is all that matters.
  __device__ bool is_settled_by(Weight largest) {
    best = logit_of_packed(largest) / temperature;
    return greedy || largest == 0 || !(fabsf(best) < INFINITY);
  }

  __device__ float score(float logit) const {
    const float quotient = logit / temperature;
    return quotient == quotient ? quotient : -INFINITY;
  }
  __device__ Weight weight(float score) const {
    return __float2ull_rn(expf(score - best) * kWeightScale);
  }
  // 0 for what min-p drops.
  __device__ Weight weight_after_min_p(float score) const {
    const float relative = expf(score - best);
    return min_p_on && relative < min_p ? 0 : __float2ull_rn(relative * kWeightScale);
  }
  // Not smaller for a smaller score; kNumBins for those whose weight is 0 for sure.
  __device__ int bin(float score) const {
    const float depth = best - score;
    return depth < -kSmallestScore ? static_cast<int>(depth * kBinsPerUnit) : kNumBins;
  }

  // The logits of kPerThread consecutive ids from first on, NaN past the end.
  __device__ void load(int first, float (&values)[kPerThread]) const {
    const bool aligned = reinterpret_cast<uint64_t>(logits) % (4 * sizeof(T)) == 0;
#pragma unroll
    for (int start = 0; start < kPerThread; start += 4) {
      float four[4] = {NAN, NAN, NAN, NAN};
      if (first + start + 4 <= vocab_size) {
        load_four(logits + first + start, aligned, four);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first + start + i < vocab_size) four[i] = to_float(logits[first + start + i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) values[start + i] = four[i];
    }
  }
};

__device__ inline int first_of_thread(int slice) {
  return slice * kSlice + static_cast<int>(threadIdx.x) * kPerThread;
}

}  // namespace llamatelemetry::sampling
