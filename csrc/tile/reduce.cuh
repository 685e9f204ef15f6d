// Reductions over a warp and over a block, in a fixed order. Every thread gets the result.
#pragma once

namespace llamatelemetry {

constexpr int kWarpSize = 32;

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffff, value, offset);
  }
  return value;
}

// Every thread of the block must call it. Uses one word of shared memory per warp.
template <int kNumThreads>
__device__ inline float block_sum(float value) {
  constexpr int kNumWarps = kNumThreads / kWarpSize;
  __shared__ float s_partial[kNumWarps];
  value = warp_sum(value);
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarpSize == 0) s_partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kNumWarps; ++warp) sum += s_partial[warp];
  return sum;
}

}  // namespace llamatelemetry
