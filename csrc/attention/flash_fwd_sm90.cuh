// out = softmax(q k^T) v on Hopper, after FlashAttention-3 (Shah et al. 2024): persistent blocks of
// one warp that copies and kConsumers warpgroups that compute, 64 query rows each.
//
// What bounds it: the tensor cores (head_dim >= 128) or the exponentials (64). So a warpgroup gives
// the tensor cores the scores of the next keys before it weighs these, and the warpgroups take
// turns where that measures better. Scores, weights and results stay in registers.
//
// Keys run from the last block of a tile to the first, so that what the window cuts comes first.
// Grid: at most one block per place on the GPU. Block (kConsumers + 1) * 128.
#pragma once

#include <cstdint>

#include "attention/flash_sm90_copy.cuh"
#include "attention/flash_sm90_softmax.cuh"
#include "attention/flash_sm90_store.cuh"
#include "attention/flash_sm90_tile.cuh"
#include "common/dtype.h"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace llamatelemetry {

// s = q k^T for one warpgroup's 64 rows. Ends without waiting.
template <typename T, typename Tile>
__device__ inline void multiply_keys(float (&r_s)[Tile::kBlockN / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int step = 0; step < Tile::kHeadDim / kDepth; ++step) {
    constexpr int kStepsPerColumnBlock = kColumnBlock / kDepth;
    const int block = step / kStepsPerColumnBlock;
    const int within = step % kStepsPerColumnBlock * kDepth * 2;
    ptx::wgmma_shared<T, Tile::kBlockN>(
        r_s, q + ((block * Tile::kBlockM * kColumnBlockBytes + within) >> 4),
        k + ((block * Tile::kBlockN * kColumnBlockBytes + within) >> 4), step > 0);
  }
  ptx::wgmma_commit();
}
// o += p v. Ends without waiting.
template <typename T, typename Tile>
__device__ inline void multiply_values(float (&r_o)[Tile::kHeadDim / 2],
                                       const uint32_t (&r_p)[Tile::kBlockN / kDepth][4],
                                       uint64_t v) {
#pragma unroll
  for (int step = 0; step < Tile::kBlockN / kDepth; ++step) {
    ptx::wgmma_registers<T, Tile::kHeadDim>(r_o, r_p[step],
                                            v + ((step * kDepth * kColumnBlockBytes) >> 4), true);
  }
  ptx::wgmma_commit();
}

// One warpgroup: its 64 rows of each tile. The last product of a tile runs beside the first of the
// next, as any two blocks of keys do.
template <typename T, typename Tile, FlashMask kMask>
__device__ void compute_tiles(const FlashSm90Args& a, FlashShared<Tile>& s) {
  constexpr int kBlockN = Tile::kBlockN;
  constexpr int kTurnBarrier = 1;  // one for each warpgroup
  constexpr int kTailBarrier = kTurnBarrier + Tile::kConsumers;
  const FlashAttnParams& p = a.p.call;
  // The same in every lane, and known to be so.
  const int group = __shfl_sync(0xffffffff, threadIdx.x / kGroupThreads - 1, 0);
  const int lane = threadIdx.x % 32;
  const int row_in_group = threadIdx.x % kGroupThreads / 32 * 16 + lane / 4;
  const int column = 2 * (lane % 4);
  const float scale_log2 = a.p.shapes_scores ? 1.0f : a.p.scale_log2;
  Ring<1> work_ring;
  Ring<Tile::kQueryStages> q_ring;
  Ring<Tile::kStages> k_ring;
  Ring<Tile::kStages> v_ring;

  const auto release = [&](uint64_t& barrier) {
    if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&barrier));
  };
  const auto next_work = [&] {
    ptx::mbarrier_wait(ptx::shared_address(&s.work_full), work_ring.parity);
    const FlashTileWork work = s.work;
    __syncwarp();
    release(s.work_empty);
    work_ring.advance();
    return work;
  };
  const auto wait_k = [&] {
    ptx::mbarrier_wait(ptx::shared_address(&s.k_full[k_ring.slot]), k_ring.parity);
  };
  const auto wait_v = [&] {
    ptx::mbarrier_wait(ptx::shared_address(&s.v_full[v_ring.slot]), v_ring.parity);
  };
  const auto release_k = [&] {
    release(s.k_empty[k_ring.slot]);
    k_ring.advance();
  };
  const auto release_v = [&] {
    release(s.v_empty[v_ring.slot]);
    v_ring.advance();
  };
  // A turn of the tensor cores: one for each block of keys of a tile and each warpgroup.
  const auto begin_turn = [&] {
    if constexpr (Tile::kTurns) ptx::named_barrier_sync(kTurnBarrier + group, 2 * kGroupThreads);
  };
  const auto end_turn = [&] {
    if constexpr (Tile::kTurns) {
      const int next = group + 1 == Tile::kConsumers ? 0 : group + 1;
      ptx::named_barrier_arrive(kTurnBarrier + next, 2 * kGroupThreads);
    }
  };
  // A block of the tile that this warpgroup's rows do not need.
  const auto pass_k = [&] {
    begin_turn();
    end_turn();
    wait_k();
    release_k();
  };
  const auto pass_v = [&] {
    wait_v();
    release_v();
  };
  const auto pass_blocks = [&](int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      pass_k();
      pass_v();
    }
  };
  const auto k_of = [&] { return ptx::k_major_descriptor(ptx::shared_address(s.k[k_ring.slot])); };
  const auto v_of = [&] {
    return ptx::mn_major_descriptor(ptx::shared_address(s.v[v_ring.slot]),
                                    kBlockN * kColumnBlockBytes);
  };
  if constexpr (Tile::kTurns) {  // the first turn is group 0's
    if (group == Tile::kConsumers - 1) end_turn();
  }

  float r_s[kBlockN / 2];
  uint32_t r_p[kBlockN / kDepth][4];
  float r_o[Tile::kHeadDim / 2];
  TwoRows rows;
  // The tile whose last product is still to come, and where it goes.
  bool pending = false;
  FlashWarpRows& to = s.rows[threadIdx.x / 32 - 4];
  const auto set_to = [&](const FlashTileWork& work, int warp_row) {
    __syncwarp();
    if (lane == 0) to = warp_rows_of<T>(p, work, warp_row);
    __syncwarp();
  };
  const auto store = [&] {
    store_rows<T, Tile>(to, p.num_heads_q * p.head_dim, static_cast<int>(p.head_dim), scale_log2,
                        r_o, rows);
  };
  const auto finish = [&] {
    wait_v();
    ptx::wgmma_fence();
    multiply_values<T, Tile>(r_o, r_p, v_of());
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(r_o);
    release_v();
    store();
    pending = false;
  };

#pragma unroll 1
  for (FlashTileWork work = next_work(); work.first_row >= 0; work = next_work()) {
    const KeyBlocks tile_blocks = blocks_of_rows<Tile, kMask>(work, work.first_row, Tile::kBlockM);
    const int first_row = work.first_row + group * kGroupRows;
    const int row = first_row + row_in_group;
    const KeyBlocks blocks = blocks_of_rows<Tile, kMask>(work, first_row, kGroupRows);
    const bool has_keys = blocks.hi > blocks.lo;
    const int num_before = tile_blocks.hi - blocks.hi;
    const bool has_tail =
        p.cu_seqlens_q != nullptr && tile_blocks.hi * kBlockN > work.window.num_keys;
    // V comes in order: a warpgroup that has to look past the next block cannot leave one behind.
    constexpr bool kOverlapsTiles = Tile::kOverlapsTiles;
    static_assert(!kOverlapsTiles || Tile::kQueryStages > 1);
    if (pending && (!kOverlapsTiles || !has_keys || has_tail || num_before > 1)) finish();

    if (has_tail && tile_blocks.hi > tile_blocks.lo) {
      // The rows past the sequence's end hold another's values: 0 * NaN is NaN.
      wait_v();
      constexpr int kChunks = kColumnBlockBytes / 16;
      const int first = work.window.num_keys - (tile_blocks.hi - 1) * kBlockN;
      const int bad = (kBlockN - first) * kChunks;
      for (int i = threadIdx.x - kGroupThreads; i < bad * Tile::kColumnBlocks;
           i += Tile::kConsumers * kGroupThreads) {
        const int block = i / bad;
        uint8_t* at = s.v[v_ring.slot] + block * kBlockN * kColumnBlockBytes +
                      first * kColumnBlockBytes + (i - block * bad) * 16;
        *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
      }
      ptx::fence_proxy_async_shared();
      ptx::named_barrier_sync(kTailBarrier, Tile::kConsumers * kGroupThreads);
    }
    if (tile_blocks.hi > tile_blocks.lo) {
      ptx::mbarrier_wait(ptx::shared_address(&s.q_full[q_ring.slot]), q_ring.parity);
    }
    if (!has_keys) {
      if (tile_blocks.hi > tile_blocks.lo) {
        pass_blocks(tile_blocks.hi - tile_blocks.lo);
        release(s.q_empty[q_ring.slot]);
        q_ring.advance();
      }
#pragma unroll
      for (int i = 0; i < Tile::kHeadDim / 2; ++i) r_o[i] = 0.0f;
      rows = {{kNoScore, kNoScore}, {0.0f, 0.0f}};
      set_to(work, row - lane / 4);
      store();
      continue;
    }

    const uint64_t q = ptx::k_major_descriptor(ptx::shared_address(s.q[q_ring.slot]) +
                                               group * kGroupRows * kColumnBlockBytes);
    FlashScoreRule rule{p.softmax_scale, p.softcap, 0.0f};
    if (p.alibi_slopes != nullptr) {
      rule.slope = p.alibi_slopes[work.place.index * p.alibi_batch_stride + work.place.head];
    }
    int ends[2];
    int begins[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      ends[h] = window_end<kMask>(work.window, row + 8 * h) - column;
      begins[h] = window_begin<kMask>(work.window, row + 8 * h) - column;
    }
    const auto weigh_block = [&](int n, auto masked, TwoRows& of, float (&keep)[2]) {
      if (a.p.shapes_scores) {
        shape_scores<kBlockN>(r_s, rule, work.window.offset + row, n * kBlockN + column);
      }
      if constexpr (decltype(masked)::value) {
        const int block_begins[2] = {begins[0] - n * kBlockN, begins[1] - n * kBlockN};
        const int block_ends[2] = {ends[0] - n * kBlockN, ends[1] - n * kBlockN};
        mask_scores<kMask, kBlockN>(r_s, block_begins, block_ends);
      }
      weigh<kBlockN>(r_s, of, scale_log2, keep);
      ptx::wgmma_hold(r_s);  // packed after the weighing, not within: that took more registers
    };

    int n = blocks.hi - 1;
    TwoRows first_rows{{kNoScore, kNoScore}, {0.0f, 0.0f}};
    float keep[2];
    if (!kOverlapsTiles || !pending) {
      pass_blocks(num_before);
    } else if (num_before > 0) {
      pass_k();
    }
    wait_k();
    begin_turn();
    ptx::wgmma_fence();
    multiply_keys<T, Tile>(r_s, q, k_of());
    if (kOverlapsTiles && pending) {
      wait_v();
      ptx::wgmma_fence();
      multiply_values<T, Tile>(r_o, r_p, v_of());
      end_turn();
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(r_s);
      release_k();
      weigh_block(n, std::true_type{}, first_rows, keep);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(r_o);
      release_v();
      if (num_before > 0) pass_v();
      store();
    } else {
      end_turn();
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(r_s);
      release_k();
      weigh_block(n, std::true_type{}, first_rows, keep);
    }
    pack_weights<T, kBlockN>(r_s, r_p);
#pragma unroll
    for (int i = 0; i < Tile::kHeadDim / 2; ++i) r_o[i] = 0.0f;
    rows = first_rows;
    set_to(work, row - lane / 4);

    // The scores of block n, beside the values of block n + 1.
    const auto step = [&](auto masked) {
      wait_k();
      begin_turn();
      ptx::wgmma_fence();
      multiply_keys<T, Tile>(r_s, q, k_of());
      wait_v();
      ptx::wgmma_fence();
      multiply_values<T, Tile>(r_o, r_p, v_of());
      end_turn();
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(r_s);
      release_k();
      weigh_block(n, masked, rows, keep);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(r_o);
      release_v();
      pack_weights<T, kBlockN>(r_s, r_p);
      if (__any_sync(0xffffffff, keep[0] * keep[1] != 1.0f)) scale_rows(r_o, keep);
    };
    --n;
    if constexpr (kMask != FlashMask::kFull) {
#pragma unroll 1
      for (const int stop = max(blocks.right_full, blocks.lo); n >= stop; --n) {
        step(std::true_type{});
      }
    }
#pragma unroll 1
    for (const int stop = max(blocks.left_full, blocks.lo); n >= stop; --n) {
      step(std::false_type{});
    }
    if constexpr (kMask == FlashMask::kLocal) {
#pragma unroll 1
      for (; n >= blocks.lo; --n) step(std::true_type{});
    }
    release(s.q_empty[q_ring.slot]);
    q_ring.advance();
    pending = true;
    if (const int num_after = blocks.lo - tile_blocks.lo; num_after > 0) {
      finish();
      pass_blocks(num_after);
    }
  }
  if (pending) finish();
}

template <typename T, typename Tile, FlashMask kMask>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    flash_fwd_sm90_kernel(const __grid_constant__ FlashSm90Args a) {
  extern __shared__ __align__(1024) uint8_t s_bytes[];
  auto& s = *reinterpret_cast<FlashShared<Tile>*>(s_bytes);
  constexpr int kConsumerWarps = Tile::kConsumers * kGroupThreads / 32;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&a.q_map);
    ptx::prefetch_tensor_map(&a.k_map);
    ptx::prefetch_tensor_map(&a.v_map);
    const auto init = [](uint64_t& full, uint64_t& empty) {
      ptx::mbarrier_init(ptx::shared_address(&full), 1);
      ptx::mbarrier_init(ptx::shared_address(&empty), kConsumerWarps);
    };
    ptx::mbarrier_init(ptx::shared_address(&s.work_full), 1);
    ptx::mbarrier_init(ptx::shared_address(&s.work_empty), kConsumerWarps + 1);
    ptx::mbarrier_init(ptx::shared_address(&s.work_wanted), 1);
    for (int i = 0; i < Tile::kQueryStages; ++i) init(s.q_full[i], s.q_empty[i]);
    for (int i = 0; i < Tile::kStages; ++i) init(s.k_full[i], s.k_empty[i]);
    for (int i = 0; i < Tile::kStages; ++i) init(s.v_full[i], s.v_empty[i]);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    ptx::setmaxnreg_dec<Tile::kCopyRegisters>();
    if (threadIdx.x == 0) copy_tiles<Tile, kMask>(a, s);
    if (threadIdx.x / 32 == 1) announce_tiles<Tile, kMask>(a, s);
  } else {
    ptx::setmaxnreg_inc<Tile::kComputeRegisters>();
    compute_tiles<T, Tile, kMask>(a, s);
  }
}

}  // namespace llamatelemetry
