// Reductions over a warp and over a block, in a fixed order. Every thread gets the result.
#pragma once

namespace llamatelemetry {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;

struct Sum {
  static constexpr float kOfNone = 0.0f;
  __device__ float operator()(float a, float b) const { return a + b; }
};
// Of numbers: a NaN is passed over.
struct Max {
  static constexpr float kOfNone = -INFINITY;
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Of each kLanes neighbours.
template <typename Combine, int kLanes = kWarpSize>
__device__ inline float warp_reduce(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value = Combine{}(value, __shfl_xor_sync(0xffffffff, value, offset));
  }
  return value;
}

// Of the four lanes that share a row of an accumulator of mma.sync or wgmma.
template <typename Combine>
__device__ inline float quad_reduce(float value) {
  value = Combine{}(value, __shfl_xor_sync(0xffffffff, value, 1));
  return Combine{}(value, __shfl_xor_sync(0xffffffff, value, 2));
}

// Every thread of the block must call it; the block is whole warps.
template <typename Combine>
__device__ inline float block_reduce(float value) {
  __shared__ float s_partial[kMaxWarps];
  value = warp_reduce<Combine>(value);
  if (blockDim.x == kWarpSize) return value;
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarpSize == 0) s_partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  // Every warp combines them all, a lane each: a loop would wait for shared memory at each step.
  const int lane = threadIdx.x % kWarpSize;
  return warp_reduce<Combine>(lane < blockDim.x / kWarpSize ? s_partial[lane] : Combine::kOfNone);
}

__device__ inline float block_sum(float value) { return block_reduce<Sum>(value); }
__device__ inline float block_max(float value) { return block_reduce<Max>(value); }

}  // namespace llamatelemetry
