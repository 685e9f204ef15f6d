// The one question of sampling, for a block: at which key does the cumulative weight exceed a
// budget? Weights are integers below 2^41; sums are exact, so their order does not matter.
#pragma once

#include <cstdint>
#include <cuda/atomic>

#include "tile/reduce.cuh"

namespace llamatelemetry::sampling {

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

struct Scanned {
  Weight before;  // sum of the values of all threads before this one
  Weight total;
};

// Every thread must call these. Not inline: a block that works alone runs its code once, so what
// costs is to fetch it.
__device__ __noinline__ Scanned block_scan(Weight value) {
  __shared__ Weight s_warp_sums[kNumWarps];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  Weight through = value;  // of all lanes up to this one
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const Weight other = __shfl_up_sync(0xffffffff, through, offset);
    if (lane >= offset) through += other;
  }
  __syncthreads();  // the last call's readers are done
  if (lane == kWarpSize - 1) s_warp_sums[warp] = through;
  __syncthreads();
  Scanned scanned{through - value, 0};
#pragma unroll
  for (int i = 0; i < kNumWarps; ++i) {
    const Weight other = s_warp_sums[i];
    if (i < warp) scanned.before += other;
    scanned.total += other;
  }
  return scanned;
}
__device__ inline Weight block_sum(Weight value) { return block_scan(value).total; }

__device__ __noinline__ Weight block_largest(Weight value) {
  __shared__ Weight s_largest[kNumWarps];
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Weight other = __shfl_xor_sync(0xffffffff, value, offset);
    value = other > value ? other : value;
  }
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarpSize == 0) s_largest[threadIdx.x / kWarpSize] = value;
  __syncthreads();
#pragma unroll
  for (const Weight other : s_largest) value = other > value ? other : value;
  return value;
}

// Values in order, kSize consecutive ones a thread, with the sum before each thread and of all.
template <int kSize>
struct Sums : Scanned {
  Weight values[kSize];

  // Every thread must call it, after it has set values.
  __device__ void scan() {
    Weight sum = 0;
#pragma unroll
    for (const Weight value : values) sum += value;
    static_cast<Scanned&>(*this) = block_scan(sum);
  }

  // The first index at which the sum through it exceeds budget, which is less than total. Every
  // thread must call it.
  __device__ Found find(Weight budget) const {
    __shared__ Found s_found;
    __syncthreads();  // the last call's readers are done
    Weight sum = before;
    if (sum <= budget) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (sum <= budget && budget < sum + values[i]) {  // true once in the block
          s_found = {static_cast<int>(threadIdx.x) * kSize + i, sum, values[i]};
        }
        sum += values[i];
      }
    }
    __syncthreads();
    return s_found;
  }
};

// The smallest key at which the weight of it and of all smaller keys exceeds budget, which is less
// than the weight of all; a digit of 8 bits a pass, a bin a thread. Every thread must call it.
template <typename KeyOf, typename WeightOf>
__device__ Selected select(int size, KeyOf key_of, WeightOf weight_of, Weight budget) {
  __shared__ uint32_t s_low[kNumThreads];
  __shared__ uint32_t s_high[kNumThreads];
  Selected selected{0, 0, 0};
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    Sums<1> bins{};
#pragma unroll 1
    for (int start = 0; start < size; start += kBlockValues) {
      s_low[threadIdx.x] = 0;
      s_high[threadIdx.x] = 0;
      __syncthreads();
      const int end = min(start + kBlockValues, size);
#pragma unroll 1
      for (int i = start + threadIdx.x; i < end; i += kNumThreads) {
        const uint64_t key = key_of(i);
        if (key >> (shift + 8) != selected.key) continue;
        const int bin = key >> shift & (kNumThreads - 1);
        if (const Weight weight = weight_of(i)) add_weight(s_low + bin, s_high + bin, weight);
      }
      __syncthreads();
      bins.values[0] += s_low[threadIdx.x] + (Weight{s_high[threadIdx.x]} << kLowBits);
    }
    bins.scan();
    const Found found = bins.find(budget - selected.before);
    selected = {selected.key << 8 | found.index, selected.before + found.before, found.at};
  }
  return selected;
}

// True in the block that is the last of num_blocks to call it, which then sees what the others
// wrote, if it reads past L1 (__ldcg).
__device__ inline bool arrives_last(uint32_t& counter, uint32_t num_blocks) {
  __shared__ bool s_last;
  __syncthreads();  // this block has written
  if (threadIdx.x == 0) {
    const cuda::atomic_ref<uint32_t, cuda::thread_scope_device> arrived(counter);
    s_last = arrived.fetch_add(1, cuda::memory_order_acq_rel) == num_blocks - 1;
  }
  __syncthreads();
  return s_last;
}

}  // namespace llamatelemetry::sampling
