// slot_mapping:  out[t] = slot of positions[t] in its sequence's blocks
// advance_step_: the inputs of a decode step become those of the next one
// A few loads a thread; a launch is all that they cost. Grid: threads over tokens or sequences, at
// most kMaxSlotBlocks blocks, in strides.
#pragma once

#include <cstdint>

#include "cache/params.h"

namespace llamatelemetry {

constexpr int64_t kMaxSlotBlocks = 4096;

template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    slot_mapping_kernel(const __grid_constant__ SlotMappingParams p) {
  const int64_t stride = int64_t{gridDim.x} * kNumThreads;
  for (int64_t token = int64_t{blockIdx.x} * kNumThreads + threadIdx.x; token < p.num_tokens;
       token += stride) {
    const int64_t row = sequence_of(p.cu_seqlens_q, p.table.batch, token);
    p.out[token] = row < 0 ? -1 : slot_of(p.table, row, p.positions[token]);
  }
}

template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    advance_step_kernel(const __grid_constant__ AdvanceStepParams p) {
  const int64_t stride = int64_t{gridDim.x} * kNumThreads;
  for (int64_t row = int64_t{blockIdx.x} * kNumThreads + threadIdx.x; row < p.table.batch;
       row += stride) {
    advance_row(p, row);
  }
}

}  // namespace llamatelemetry
