// The one question of sampling, for a block: at which key does the cumulative weight exceed a
// budget? Weights are integers below 2^41; sums are exact, so their order does not matter.
#pragma once

#include <cstdint>

#include "tile/reduce.cuh"

namespace llamatelemetry {

using Weight = unsigned long long;  // the uint64_t that atomicAdd takes

constexpr int kNumThreads = 256;
constexpr int kNumWarps = kNumThreads / kWarpSize;
constexpr int kPerThread = 8;  // values of a thread, consecutive ones
constexpr int kBlockValues = kNumThreads * kPerThread;

// A weight as two words, because shared memory adds words atomically and 64 bits only in a loop of
// compare and swap. As many as kBlockValues of them fit.
constexpr int kLowBits = 20;

__device__ inline void add_weight(uint32_t* s_low, uint32_t* s_high, Weight weight) {
  atomicAdd(s_low, static_cast<uint32_t>(weight) & ((1u << kLowBits) - 1));
  if (weight >> kLowBits) atomicAdd(s_high, static_cast<uint32_t>(weight >> kLowBits));
}

struct Found {
  int index;
  Weight before;  // of smaller indices
  Weight at;
};

struct Selected {
  uint32_t key;
  Weight before;  // of smaller keys
  Weight at;      // of this key
};

struct SelectScratch {
  uint32_t low[kNumThreads];
  uint32_t high[kNumThreads];
  Weight warp_sums[kNumWarps];
  Found found;
};

// Combined over the block, the result in every thread.
template <typename Combine>
__device__ Weight block_combine(SelectScratch& s_scratch, Weight value, Combine combine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarpSize == 0) s_scratch.warp_sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  Weight result = s_scratch.warp_sums[0];
#pragma unroll
  for (int warp = 1; warp < kNumWarps; ++warp) {
    result = combine(result, s_scratch.warp_sums[warp]);
  }
  return result;
}

// Values in order, kSize consecutive ones a thread, with the sum before each thread and of all.
template <int kSize>
struct Sums {
  Weight values[kSize];
  Weight before;
  Weight total;

  // Every thread must call it, after it has set values.
  __device__ void scan(SelectScratch& s_scratch) {
    Weight sum = 0;
#pragma unroll
    for (const Weight value : values) sum += value;
    Weight through = sum;  // of all lanes up to this one
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const Weight other = __shfl_up_sync(0xffffffff, through, offset);
      if (lane >= offset) through += other;
    }
    __syncthreads();  // the last call's readers are done
    if (lane == kWarpSize - 1) s_scratch.warp_sums[warp] = through;
    __syncthreads();
    before = through - sum;
    total = 0;
#pragma unroll
    for (int i = 0; i < kNumWarps; ++i) {
      const Weight other = s_scratch.warp_sums[i];
      if (i < warp) before += other;
      total += other;
    }
  }

  // The first index at which the sum through it exceeds budget, which is less than total. Every
  // thread must call it.
  __device__ Found find(SelectScratch& s_scratch, Weight budget) const {
    __syncthreads();  // the last call's readers are done
    Weight sum = before;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (sum <= budget && budget < sum + values[i]) {  // true once in the block
        s_scratch.found = {static_cast<int>(threadIdx.x) * kSize + i, sum, values[i]};
      }
      sum += values[i];
    }
    __syncthreads();
    return s_scratch.found;
  }
};

// The smallest key at which the weight of it and of all smaller keys exceeds budget, which is less
// than the weight of all. Keys have kNumDigits digits of 8 bits, a bin a thread. Every thread must
// call it.
template <int kNumDigits, typename KeyOf, typename WeightOf>
__device__ Selected select(SelectScratch& s_scratch, int size, KeyOf key_of, WeightOf weight_of,
                           Weight budget) {
  Selected selected{0, 0, 0};
  uint32_t& s_low = s_scratch.low[threadIdx.x];
  uint32_t& s_high = s_scratch.high[threadIdx.x];
  for (int shift = 8 * (kNumDigits - 1); shift >= 0; shift -= 8) {
    Sums<1> bins{};
    for (int start = 0; start < size; start += kBlockValues) {
      s_low = 0;
      s_high = 0;
      __syncthreads();
      const int end = min(start + kBlockValues, size);
      for (int i = start + threadIdx.x; i < end; i += kNumThreads) {
        const uint64_t key = key_of(i);
        if (key >> (shift + 8) != selected.key) continue;
        const int bin = key >> shift & (kNumThreads - 1);
        if (const Weight weight = weight_of(i)) {
          add_weight(&s_scratch.low[bin], &s_scratch.high[bin], weight);
        }
      }
      __syncthreads();
      bins.values[0] += s_low + (Weight{s_high} << kLowBits);
    }
    bins.scan(s_scratch);
    const Found found = bins.find(s_scratch, budget - selected.before);
    selected = {selected.key << 8 | found.index, selected.before + found.before, found.at};
  }
  return selected;
}

}  // namespace llamatelemetry
