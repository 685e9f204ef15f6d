// One token a row from softmax(logits / temperature) after top-k, top-p and min-p, see row.h.
// Everything is one question, answered by select: at which key does the cumulative weight exceed a
// budget? With the rank of the score as key and 1 as weight it is top-k, with the probability as
// weight top-p, and with the id as key the draw itself. A digit of 8 bits a pass, histograms by
// integer atomics in shared memory, so the sums are exact and their order does not matter.
// Bound by the passes over the row, which stays in L2: 1 for greedy, up to 16 with every filter.
// Grid [batch], block kNumThreads.
#pragma once

#include <cstdint>

#include "sampling/row.h"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

using Weight = unsigned long long;  // the uint64_t that atomicAdd takes

constexpr int kNumBins = 256;
constexpr int kBinsPerLane = kNumBins / kWarpSize;

struct SelectScratch {
  Weight bins[kNumBins];
  Weight below;
  Weight at;
  uint32_t digit;
};

struct Selected {
  uint32_t key;
  Weight below;  // weight of smaller keys
  Weight at;     // weight of this key
};

// The smallest key at which the weight of it and of all smaller keys exceeds budget, which is less
// than the weight of all. Keys have kNumDigits digits of 8 bits. Every thread must call it.
template <int kNumDigits, int kNumThreads, typename KeyOf, typename WeightOf>
__device__ Selected select(SelectScratch& s_scratch, int size, KeyOf key_of, WeightOf weight_of,
                           Weight budget) {
  Selected selected{0, 0, 0};
  for (int shift = 8 * (kNumDigits - 1); shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < kNumBins; bin += kNumThreads) s_scratch.bins[bin] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kNumThreads) {
      const uint64_t key = key_of(i);
      if (key >> (shift + 8) != selected.key) continue;
      if (const Weight weight = weight_of(i)) {
        atomicAdd(&s_scratch.bins[key >> shift & (kNumBins - 1)], weight);
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      Weight sum = 0;
      for (int j = 0; j < kBinsPerLane; ++j) {
        sum += s_scratch.bins[threadIdx.x * kBinsPerLane + j];
      }
      Weight through = sum;  // of the bins of all lanes up to this one
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const Weight other = __shfl_up_sync(0xffffffff, through, offset);
        if (threadIdx.x >= offset) through += other;
      }
      Weight below = selected.below + through - sum;
      if (below <= budget && budget < below + sum) {  // true in exactly one lane
        uint32_t bin = threadIdx.x * kBinsPerLane;
        while (below + s_scratch.bins[bin] <= budget) below += s_scratch.bins[bin++];
        s_scratch.below = below;
        s_scratch.at = s_scratch.bins[bin];
        s_scratch.digit = bin;
      }
    }
    __syncthreads();
    selected = {selected.key << 8 | s_scratch.digit, s_scratch.below, s_scratch.at};
  }
  return selected;
}

// Sum or largest of a value over the block; every thread must call it and gets the result.
template <int kNumThreads, typename Combine>
__device__ Weight block_reduce(Weight value, Combine combine) {
  __shared__ Weight s_partial[kNumThreads / kWarpSize];
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarpSize == 0) s_partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  Weight result = s_partial[0];
  for (int warp = 1; warp < kNumThreads / kWarpSize; ++warp) {
    result = combine(result, s_partial[warp]);
  }
  return result;
}

__device__ inline uint32_t rank_of(float score) {
  return rank_of_bits(__float_as_uint(score + 0.0f));
}
// The float that has this rank.
__device__ inline float score_of_rank(uint32_t rank) {
  return __uint_as_float(rank & 0x80000000 ? rank : ~rank & 0x7fffffff);
}

// The largest number in the upper half, for the lowest id in the lower; 0 when all are NaN.
template <int kNumThreads, typename T>
__device__ Weight largest_logit(const T* logits, int vocab_size) {
  Weight largest = 0;
  for (int i = threadIdx.x; i < vocab_size; i += kNumThreads) {
    const float logit = to_float(logits[i]);
    const Weight packed = Weight{~rank_of(logit)} << 32 | ~static_cast<uint32_t>(i);
    if (logit == logit && packed > largest) largest = packed;
  }
  return block_reduce<kNumThreads>(largest, [](Weight a, Weight b) { return a > b ? a : b; });
}

template <typename T, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads) sample_kernel(const SampleParams p) {
  __shared__ SelectScratch s_scratch;
  const int64_t row_index = blockIdx.x;
  const T* logits = static_cast<const T*>(p.logits) + row_index * p.logits_row_stride;
  const auto vocab_size = static_cast<int>(p.vocab_size);
  const SampleRow row = sample_row(p, row_index);

  const Weight largest = largest_logit<kNumThreads>(logits, vocab_size);
  const float best = score_of_rank(~static_cast<uint32_t>(largest >> 32)) / row.temperature;
  if (row.greedy || largest == 0 || !(fabsf(best) < INFINITY)) {
    if (threadIdx.x == 0) {
      p.out[row_index] = largest == 0 ? 0 : ~static_cast<uint32_t>(largest);
    }
    return;
  }

  const auto score = [&](int i) {
    const float quotient = to_float(logits[i]) / row.temperature;
    return quotient == quotient ? quotient : -INFINITY;
  };
  const auto rank = [&](int i) { return rank_of(score(i)); };
  const auto relative = [&](float score) { return expf(score - best); };
  const auto weight_of = [&](float score) {
    return static_cast<Weight>(__float2ull_rn(relative(score) * kWeightScale));
  };
  const auto id = [](int i) { return static_cast<uint32_t>(i); };
  const auto add = [](Weight a, Weight b) { return a + b; };

  // Kept are ranks below last_rank, and of those equal to it ids from first_equal on.
  uint32_t last_rank = 0xffffffff;
  int first_equal = 0;
  if (row.top_k < p.vocab_size) {
    const auto one = [](int) { return Weight{1}; };
    last_rank = select<4, kNumThreads>(s_scratch, vocab_size, rank, one, row.top_k - 1).key;
  }
  const auto weight = [&](int i) {
    const float s = score(i);
    const uint32_t r = rank_of(s);
    const bool kept = r < last_rank || (r == last_rank && i >= first_equal);
    return kept && !(row.min_p_on && relative(s) < row.min_p) ? weight_of(s) : 0;
  };
  const auto total_weight = [&](auto weight_of_id) {
    Weight sum = 0;
    for (int i = threadIdx.x; i < vocab_size; i += kNumThreads) sum += weight_of_id(i);
    return block_reduce<kNumThreads>(sum, add);
  };
  if (row.top_p_on) {
    const auto top_k_weight = [&](int i) {
      const float s = score(i);
      return rank_of(s) <= last_rank ? weight_of(s) : 0;
    };
    const Weight wanted = top_p_weight(row.top_p, total_weight(top_k_weight));
    const Selected last =
        select<4, kNumThreads>(s_scratch, vocab_size, rank, top_k_weight, wanted - 1);
    last_rank = last.key;
    const Weight each = weight_of(score_of_rank(last.key));
    const Weight removed = last.at / each - ((wanted - 1 - last.below) / each + 1);
    if (removed > 0) {
      const auto equal = [&](int i) { return Weight{rank(i) == last_rank}; };
      first_equal =
          static_cast<int>(select<3, kNumThreads>(s_scratch, vocab_size, id, equal, removed).key);
    }
  }
  const Weight target =
      random_below(total_weight(weight), random_bits(p.seed[row_index], p.offset[row_index]));
  const uint32_t token = select<3, kNumThreads>(s_scratch, vocab_size, id, weight, target).key;
  if (threadIdx.x == 0) p.out[row_index] = token;
}

}  // namespace llamatelemetry
