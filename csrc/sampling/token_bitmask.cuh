// logits[row, token] = -inf where the token's bit is not set. A warp takes a word, a lane a token,
// so that the 32 stores of a word are one line; an allowed token's logit is neither read nor
// written. Grid: (warps over words, at most kMaxBitmaskBlocks, in strides; rows, at most 65535, in
// strides).
#pragma once

#include <cstdint>

#include "sampling/params.h"
#include "tile/convert.cuh"

namespace llamatelemetry {

constexpr int64_t kMaxBitmaskBlocks = 1024;
constexpr int64_t kMaxBitmaskRows = 65535;

template <typename T, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    token_bitmask_kernel(const __grid_constant__ TokenBitmaskParams p) {
  constexpr int kWarps = kNumThreads / static_cast<int>(kTokensPerWord);
  const int warp = static_cast<int>(threadIdx.x) / static_cast<int>(kTokensPerWord);
  const int lane = static_cast<int>(threadIdx.x) % static_cast<int>(kTokensPerWord);
  for (int64_t row = blockIdx.y; row < p.batch; row += gridDim.y) {
    const int32_t* bitmask = p.bitmask + row * p.bitmask_row_stride;
    T* logits = static_cast<T*>(p.logits) + row * p.logits_row_stride;
    for (int64_t word = int64_t{blockIdx.x} * kWarps + warp; word < p.num_words;
         word += int64_t{gridDim.x} * kWarps) {
      const int64_t token = word * kTokensPerWord + lane;
      const bool allowed = static_cast<uint32_t>(bitmask[word]) >> lane & 1u;
      if (token < p.vocab_size && !allowed) logits[token] = from_float<T>(-INFINITY);
    }
  }
}

}  // namespace llamatelemetry
