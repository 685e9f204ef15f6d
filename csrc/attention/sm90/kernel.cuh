// out = softmax(q k^T) v on Hopper, after FlashAttention-3 (Shah et al. 2024): persistent blocks of
// a thread that schedules tiles, a warp that copies, and kConsumers warpgroups that compute, 64
// query rows each.
//
// What bounds it: the tensor cores (head_dim >= 128) or the exponentials (64). So a warpgroup gives
// the tensor cores the scores of the next keys before it exponentiates these, and the warpgroups
// drift apart: while one exponentiates the others multiply. Scores, weights and results stay in
// registers. No running max: a block is exponentiated against the row's first max; only when its
// weights sum past kMaxWeightSum are accumulators rescaled.
//
// Keys run from the last block of a tile to the first, so that what the window cuts comes first.
// Grid: at most one block per multiprocessor. Block (kConsumers + 1) * 128.
#pragma once

#include <cstdint>

#include "attention/sm90/consumer.cuh"
#include "attention/sm90/producer.cuh"
#include "attention/sm90/scheduler.cuh"
#include "attention/sm90/storage.cuh"
#include "ptx/tma.cuh"
#include "tile/dependent_launch.cuh"

namespace llamatelemetry {

template <typename T, typename Tile, MaskKind kMask>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_sm90_kernel(const __grid_constant__ Sm90Args a) {
  extern __shared__ __align__(1024) uint8_t s_bytes[];
  auto& s = *reinterpret_cast<Sm90Storage<Tile>*>(s_bytes);
  constexpr int kConsumerWarps = Tile::kConsumers * kGroupThreads / 32;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&a.q_map);
    ptx::prefetch_tensor_map(&a.k_map);
    ptx::prefetch_tensor_map(&a.v_map);
    ptx::prefetch_tensor_map(&a.out_map);
    const auto init = [](uint64_t& full, uint64_t& empty) {
      ptx::mbarrier_init(ptx::shared_address(&full), 1);
      ptx::mbarrier_init(ptx::shared_address(&empty), kConsumerWarps);
    };
    for (int i = 0; i < kWorkSlots; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&s.work_full[i]), 1);
      ptx::mbarrier_init(ptx::shared_address(&s.work_empty[i]), kConsumerWarps + 1);
    }
    ptx::mbarrier_init(ptx::shared_address(&s.work_wanted), 1);
    for (int i = 0; i < Tile::kQueryStages; ++i) init(s.q_full[i], s.q_empty[i]);
    for (int i = 0; i < Tile::kStages; ++i) init(s.k_full[i], s.k_empty[i]);
    for (int i = 0; i < Tile::kStages; ++i) init(s.v_full[i], s.v_empty[i]);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  wait_for_predecessors();
  if (threadIdx.x < kGroupThreads) {
    ptx::setmaxnreg_dec<Tile::kCopyRegisters>();
    constexpr bool kServesPages = kMask != MaskKind::kFull && Tile::kServesPages;
    if (kServesPages && a.p.call.k.page_size > 0) {
      if (threadIdx.x < 32) Producer<Tile, kServesPages>(a, s).run();
    } else if (threadIdx.x == 0) {
      Producer<Tile, false>(a, s).run();
    }
    if (threadIdx.x == 32) publish_tiles<Tile, kMask>(a, s);
  } else {
    ptx::setmaxnreg_inc<Tile::kComputeRegisters>();
    Consumer<T, Tile, kMask>(a, s).run();
  }
}

}  // namespace llamatelemetry
