// out = softmax(q k^T) v on Hopper, after FlashAttention-3 (Shah et al. 2024): persistent blocks of
// a warp that deals out tiles, one that copies, and kConsumers warpgroups that compute, 64 query
// rows each.
//
// What bounds it: the tensor cores (head_dim >= 128) or the exponentials (64). So a warpgroup gives
// the tensor cores the scores of the next keys before it weighs these, and the warpgroups drift
// apart: while one weighs the others multiply. Scores, weights and results stay in registers.
// Nothing looks for the largest score of a block before it is weighed: kMostWeight.
//
// Keys run from the last block of a tile to the first, so that what the window cuts comes first.
// Grid: at most one block per place on the GPU. Block (kConsumers + 1) * 128.
#pragma once

#include <cstdint>

#include "attention/sm90/epilogue.cuh"
#include "attention/sm90/producer.cuh"
#include "attention/sm90/scheduler.cuh"
#include "attention/sm90/softmax.cuh"
#include "attention/sm90/storage.cuh"
#include "common/dtype.h"
#include "ptx/dependent_launch.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "tile/dependent_launch.cuh"

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
// From weights of lost rows back to their scores, for one warp's 16 rows, by products of a warp: q
// and its keys still lie there. What weighs nothing, as it is masked or far below, is -inf now.
template <typename T, typename Tile>
__device__ inline void multiply_keys_again(float (&r_s)[Tile::kBlockN / 2], const bool (&lost)[2],
                                           uint32_t q, uint32_t k) {
  const int lane = threadIdx.x % 32;
  // Of the four matrices of 8 x 8 that a lane's address is for one row of: q's are by rows first,
  // those of keys by columns first.
  const int q_row = lane % 16;
  const int k_row = lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int pair = 0; pair < Tile::kBlockN / 16; ++pair) {
    float sums[2][4] = {};
#pragma unroll 1
    for (int step = 0; step < Tile::kHeadDim / kDepth; ++step) {
      constexpr int kStepsPerColumnBlock = kColumnBlock / kDepth;
      const int block = step / kStepsPerColumnBlock;
      const int chunk = step % kStepsPerColumnBlock * 2;  // of 16 bytes
      uint32_t rows[4];
      uint32_t keys[4];
      ptx::ldmatrix_x4(rows, q + (block * Tile::kBlockM + q_row) * kColumnBlockBytes +
                                 ((chunk + lane / 16) ^ q_row % 8) * 16);
      ptx::ldmatrix_x4(keys, k + (block * Tile::kBlockN + 16 * pair + k_row) * kColumnBlockBytes +
                                 ((chunk + lane / 8 % 2) ^ k_row % 8) * 16);
      ptx::mma_m16n8k16(sums[0], rows, keys[0], keys[1], sums[0], T{});
      ptx::mma_m16n8k16(sums[1], rows, keys[2], keys[3], sums[1], T{});
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = r_s[8 * pair + i];
      const float again = score != 0.0f ? sums[i / 4][i % 4] : -INFINITY;
      score = lost[i % 4 / 2] ? again : score;
    }
  }
}
// o = p v, or o += p v where adds. Ends without waiting.
template <typename T, typename Tile>
__device__ inline void multiply_values(float (&r_o)[Tile::kHeadDim / 2],
                                       const uint32_t (&r_p)[Tile::kBlockN / kDepth][4], uint64_t v,
                                       bool adds) {
#pragma unroll
  for (int step = 0; step < Tile::kBlockN / kDepth; ++step) {
    ptx::wgmma_registers<T, Tile::kHeadDim>(
        r_o, r_p[step], v + ((step * kDepth * kColumnBlockBytes) >> 4), step > 0 || adds);
  }
  ptx::wgmma_commit();
}

// One warpgroup: its 64 rows of each tile. Branches around what moves a ring or issues a product
// take whole warps, and the compiler can see that: else it keeps the rings in ordinary registers
// and moves the descriptors of every product (benchmarks/NOTES.md).
template <typename T, typename Tile, MaskKind kMask>
__device__ void compute_tiles(const Sm90Args& a, Sm90Storage<Tile>& s) {
  constexpr int kBlockN = Tile::kBlockN;
  constexpr int kTailBarrier = 1;
  constexpr int kStoreBarrier = 2;  // and one for each further warpgroup
  const AttentionParams& p = a.p.call;
  // The same in every lane, and known to be so by the shuffle.
  const int warp = __shfl_sync(0xffffffff, (threadIdx.x - kGroupThreads) / 32, 0);
  const int group = warp / 4;
  const int lane = threadIdx.x % 32;
  const int column = 2 * (lane % 4);
  const float scale_log2 = a.p.needs_score_rule ? 1.0f : a.p.scale_log2;
  Ring<kWorkSlots> work_ring;
  Ring<Tile::kQueryStages> full_q_ring;
  Ring<Tile::kQueryStages> q_ring;  // the next to be given back
  Ring<Tile::kStages> k_ring;
  Ring<Tile::kStages> v_ring;

  const auto release = [&](uint64_t& barrier) {
    if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&barrier));
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
  // Once the results that left by way of it are read.
  const auto release_q = [&] {
    if (Tile::kStoresInQueries && lane == 0) ptx::bulk_wait_read<0>();
    release(s.q_empty[q_ring.slot]);
    q_ring.advance();
  };
  // Blocks of the tile that this warpgroup's rows do not need.
  const auto pass_blocks = [&](int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      wait_k();
      wait_v();
      __syncwarp();  // or the first lane gives back what another has not seen come
      release_k();
      release_v();
    }
  };

  float r_s[kBlockN / 2];
  uint32_t r_p[kBlockN / kDepth][4];
  float r_o[Tile::kHeadDim / 2];
  const auto begin_scores = [&](uint64_t q) {
    wait_k();
    ptx::wgmma_fence();
    multiply_keys<T, Tile>(r_s, q, ptx::k_major_descriptor(ptx::shared_address(s.k[k_ring.slot])));
  };
  const auto begin_values = [&](bool adds) {
    wait_v();
    ptx::wgmma_fence();
    multiply_values<T, Tile>(r_o, r_p,
                             ptx::mn_major_descriptor(ptx::shared_address(s.v[v_ring.slot]),
                                                      kBlockN * kColumnBlockBytes),
                             adds);
  };
  // Until a tile is announced. Returns where.
  const auto await_tile = [&] {
    const int slot = work_ring.slot;
    ptx::mbarrier_wait(ptx::shared_address(&s.work_full[slot]), work_ring.parity);
    work_ring.advance();
    return slot;
  };

  // In a tile: the queries before, where they were not given back yet, which is where both buffers
  // were filled since.
  const auto release_last_q = [&] {
    if (Tile::kStoresInQueries && q_ring.slot == full_q_ring.slot) release_q();
  };

  int next_slot = await_tile();
#pragma unroll 1
  while (s.work[next_slot].first_row != kNoRow) {
    const int slot = next_slot;
    const TileWork<Tile>& work = s.work[slot];
    const KeyBlocks tile_blocks = work.blocks;
    const KeyBlocks blocks = work.group_blocks[group];
    const int num_tile_blocks = tile_blocks.hi - tile_blocks.lo;
    const bool has_keys = blocks.hi > blocks.lo;
    uint8_t* const queries = s.q[full_q_ring.slot];
    const uint64_t q = ptx::k_major_descriptor(ptx::shared_address(queries) +
                                               group * kGroupRows * kColumnBlockBytes);
    ptx::mbarrier_wait(ptx::shared_address(&s.q_full[full_q_ring.slot]), full_q_ring.parity);
    full_q_ring.advance();
    const bool has_tail = p.cu_seqlens_q != nullptr && num_tile_blocks > 0 &&
                          tile_blocks.hi * kBlockN > work.window.num_keys;
    if (has_tail) {
      // The rows past the sequence's end hold another's values: 0 * NaN is NaN.
      release_last_q();  // these may come after queries that wait for it
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
    const bool always = a.p.needs_score_rule;
    TwoRows rows{{kNoReference, kNoReference}, {0.0f, 0.0f}, {always, always}};
    float scale[2];
    if (has_keys) {
      pass_blocks(tile_blocks.hi - blocks.hi);
      begin_scores(q);
      release_last_q();
      const ScoreTerms rule{a.p.scale_log2, a.p.cap_log2, a.p.cap_rate, work.slope};
      const int row = work.first_row + warp * kWarpRows + lane / 4;
      const int position = work.window.offset + row;
      int ends[2];
      int begins[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ends[h] = window_end<kMask>(work.window, row + 8 * h) - column;
        begins[h] = window_begin<kMask>(work.window, row + 8 * h) - column;
      }
      float keep[2];
      float totals[2];
      // The scores of block n to weights. raises: whether the references are raised before.
      // One piece of code for blocks that are masked and others: two, and those of three warpgroups
      // at different places of the tile, push each other out of the instruction cache.
      const auto weigh_block = [&](int n, auto may_be_masked, bool raises) {
        if (a.p.needs_score_rule) shape_scores<kBlockN>(r_s, rule, position, n * kBlockN + column);
        if (decltype(may_be_masked)::value &&
            (n >= blocks.right_full || (kMask == MaskKind::kLocal && n < blocks.left_full))) {
          const int block_begins[2] = {begins[0] - n * kBlockN, begins[1] - n * kBlockN};
          const int block_ends[2] = {ends[0] - n * kBlockN, ends[1] - n * kBlockN};
          mask_scores<kMask, kBlockN>(r_s, block_begins, block_ends);
        }
        if (raises) raise_references<kBlockN>(r_s, rows, scale_log2, keep);
        weigh<kBlockN>(r_s, rows, scale_log2, totals);
        ptx::wgmma_hold(r_s);  // packed after the weighing, not within: that took more registers
      };
      // Of weights that are too large: scales them down where float32 holds them. Else multiplies
      // their scores again, and from here on their references are raised before they are weighed.
      const auto weigh_again = [&](int k_slot) {
        bool shrinks[2];
        bool lost[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool too_large = quad_any(!(totals[h] <= kMostWeight<T>)) & !rows.always[h];
          lost[h] = quad_any(!(totals[h] < kLostWeight)) & too_large;
          shrinks[h] = too_large & !lost[h];
        }
        shrink_weights<kBlockN>(r_s, rows, totals, shrinks, keep);
        if (__any_sync(0xffffffff, lost[0] || lost[1])) {
          rows.always[0] |= lost[0];
          rows.always[1] |= lost[1];
          multiply_keys_again<T, Tile>(
              r_s, lost, ptx::shared_address(queries) + warp * kWarpRows * kColumnBlockBytes,
              ptx::shared_address(s.k[k_slot]));
          weigh_lost<kBlockN>(r_s, rows, scale_log2, totals, lost, keep);
        }
      };

      int n = blocks.hi - 1;
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(r_s);
      release_k();
      weigh_block(n, std::true_type{}, true);
      rows.sum[0] = totals[0];
      rows.sum[1] = totals[1];
      bool raises = rows.any_raises();
      pack_weights<T, kBlockN>(r_s, r_p);
      bool adds = false;  // whether r_o holds something of this tile

      // The scores of block n, beside the values of block n + 1.
#pragma unroll 1
      for (--n; n >= blocks.lo; --n) {
        begin_scores(q);
        begin_values(adds);
        adds = true;
        ptx::wgmma_wait<1>();
        ptx::wgmma_hold(r_s);
        weigh_block(n, std::bool_constant<kMask != MaskKind::kFull>{}, raises);
        // The vote needs every weight: it keeps the compiler from waiting first and weighing only
        // then. The wait is under no condition, as all warps of a group must come to the same one.
        const bool fits = totals[0] + totals[1] <= kMostWeight<T>;
        const bool again = !__all_sync(0xffffffff, fits);
        const int k_slot = k_ring.slot;
        if (!again) release(s.k_empty[k_slot]);
        k_ring.advance();
        if (again || raises) __syncwarp();
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(r_o);
        if (again || raises) {
          if (!raises) keep[0] = keep[1] = 1.0f;
          if (again) {
            weigh_again(k_slot);
            release(s.k_empty[k_slot]);
          }
          const bool shrink = keep[0] != 1.0f || keep[1] != 1.0f;
          if (__any_sync(0xffffffff, shrink)) scale_rows(r_o, keep);
          raises = rows.any_raises();
        }
        rows.sum[0] += totals[0];
        rows.sum[1] += totals[1];
        release_v();
        pack_weights<T, kBlockN>(r_s, r_p);
      }
      // Before the values: they come after the next tile's queries.
      if constexpr (!Tile::kStoresInQueries) release_q();
      begin_values(adds);
      store_lse(p, work, warp, rows, scale);
      next_slot = await_tile();
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(r_o);
      release_v();
      pass_blocks(blocks.lo - tile_blocks.lo);
    } else {
      __syncwarp();
      if constexpr (Tile::kStoresInQueries) {
        release_last_q();
      } else {
        release_q();
      }
      pass_blocks(num_tile_blocks);
#pragma unroll
      for (int i = 0; i < Tile::kHeadDim / 2; ++i) r_o[i] = 0.0f;
      store_lse(p, work, warp, rows, scale);
      next_slot = await_tile();
    }
    if constexpr (Tile::kStoresInQueries) {
      // Every warp's products with these queries are done.
      ptx::named_barrier_sync(kStoreBarrier + group, kGroupThreads);
      store_rows<T, Tile>(a, work, warp, queries, r_o, scale);
    } else {
      store_rows<T, Tile>(a, work, warp, s.out, r_o, scale);
    }
    __syncwarp();
    release(s.work_empty[slot]);
  }
  if (lane == 0) ptx::bulk_wait_read<0>();  // shared memory outlives what is read of it
}

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
    if (kServesPages && a.p.call.page_size > 0) {
      if (threadIdx.x < 32) copy_tiles<Tile, kServesPages>(a, s);
    } else if (threadIdx.x == 0) {
      copy_tiles<Tile, false>(a, s);
    }
    if (threadIdx.x == 32) publish_tiles<Tile, kMask>(a, s);
  } else {
    ptx::setmaxnreg_inc<Tile::kComputeRegisters>();
    compute_tiles<T, Tile, kMask>(a, s);
  }
}

}  // namespace llamatelemetry
