// Reductions over a warp and over a block, in a fixed order. Every thread gets the result.
#pragma once

namespace llamatelemetry {

constexpr int kWarpSize = 32;

struct Sum {
  static constexpr float kStart = 0.0f;
  __device__ float operator()(float a, float b) const { return a + b; }
};
// Of numbers: a NaN is passed over.
struct Max {
  static constexpr float kStart = -__builtin_huge_valf();
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <typename Combine>
__device__ inline float warp_reduce(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = Combine{}(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  return value;
}

// Every thread of the block must call it. Uses one word of shared memory per warp.
template <typename Combine, int kNumThreads>
__device__ inline float block_reduce(float value) {
  constexpr int kNumWarps = kNumThreads / kWarpSize;
  __shared__ float s_partial[kNumWarps];
  value = warp_reduce<Combine>(value);
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarpSize == 0) s_partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float result = s_partial[0];
#pragma unroll
  for (int warp = 1; warp < kNumWarps; ++warp) result = Combine{}(result, s_partial[warp]);
  return result;
}

template <int kNumThreads>
__device__ inline float block_sum(float value) {
  return block_reduce<Sum, kNumThreads>(value);
}
template <int kNumThreads>
__device__ inline float block_max(float value) {
  return block_reduce<Max, kNumThreads>(value);
}

}  // namespace llamatelemetry
