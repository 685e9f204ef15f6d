// The two warps of the Hopper kernel that compute nothing: one deals out tiles, one copies.
#pragma once

#include <cstdint>

#include "attention/flash_sm90_tile.cuh"
#include "ptx/tma.cuh"

namespace llamatelemetry {

// One warp: deals out the tiles. A tile is claimed as late as its first copies allow: then the
// tiles at work are neighbours in the schedule, which is what keeps keys and values in L2, and
// nobody sits on a tile that another block could have begun.
template <typename Tile, FlashMask kMask>
__device__ void announce_tiles(const FlashSm90Args& a, FlashShared<Tile>& s) {
  const int lane = threadIdx.x % 32;
  const int num_blocks = gridDim.x;
  Ring<1> ring;
  const auto claim = [&] {
    int tile = num_blocks;
    if (lane == 0 && num_blocks < a.schedule.num_tiles) tile += atomicAdd(a.p.call.tile_counter, 1);
    return __shfl_sync(0xffffffff, tile, 0);
  };
  const auto announce = [&](const FlashTileWork& work) {
    ptx::mbarrier_wait(ptx::shared_address(&s.work_empty), ring.parity ^ 1);
    if (lane == 0) {
      s.work = work;
      ptx::mbarrier_arrive(ptx::shared_address(&s.work_full));
    }
  };

  for (int tile = blockIdx.x; tile < a.schedule.num_tiles; tile = claim()) {
    const FlashTileWork work = work_of_tile<Tile>(a, tile);
    if (work.first_row >= work.num_queries) continue;
    announce(work);
    ptx::mbarrier_wait(ptx::shared_address(&s.work_wanted), ring.parity);
    ring.advance();
  }
  announce({.first_row = -1});
}

// One thread: copies what the tiles need, as far ahead as the rings allow.
template <typename Tile, FlashMask kMask>
__device__ void copy_tiles(const FlashSm90Args& a, FlashShared<Tile>& s) {
  const FlashAttnParams& p = a.p.call;
  Ring<1> work_ring;
  Ring<Tile::kQueryStages> q_ring;
  Ring<Tile::kStages> k_ring;
  Ring<Tile::kStages> v_ring;
  const uint64_t once = ptx::policy_evict_first();
  const uint64_t often = ptx::policy_evict_last();
  const int group = static_cast<int>(p.num_heads_q / p.num_heads_kv);

#pragma unroll 1
  while (true) {
    ptx::mbarrier_wait(ptx::shared_address(&s.work_full), work_ring.parity);
    const FlashTileWork work = s.work;
    ptx::mbarrier_arrive(ptx::shared_address(&s.work_empty));
    work_ring.advance();
    if (work.first_row < 0) return;
    const KeyBlocks blocks = blocks_of_rows<Tile, kMask>(work, work.first_row, Tile::kBlockM);
    const auto want_next = [&] { ptx::mbarrier_arrive(ptx::shared_address(&s.work_wanted)); };
    if (blocks.hi <= blocks.lo) {
      want_next();
      continue;
    }
    const int kv_head = work.place.head / group;
    const int first_query = static_cast<int>(work.sequence.first_query) + work.first_row;
    const int first_key = static_cast<int>(work.sequence.first_key);
    const int batch = p.cu_seqlens_q == nullptr ? work.place.index : 0;

    const auto load_k = [&](int n) {
      const uint32_t full = ptx::shared_address(&s.k_full[k_ring.slot]);
      ptx::mbarrier_wait(ptx::shared_address(&s.k_empty[k_ring.slot]), k_ring.parity ^ 1);
      ptx::mbarrier_arrive_expect(full, Tile::kKeyBytes);
      const uint32_t to = ptx::shared_address(s.k[k_ring.slot]);
#pragma unroll
      for (int c = 0; c < Tile::kColumnBlocks; ++c) {
        ptx::tma_load_4d(to + c * Tile::kBlockN * kColumnBlockBytes, &a.k_map, full,
                         c * kColumnBlock, first_key + n * Tile::kBlockN, kv_head * a.k_head_step,
                         batch * a.k_batch_step, often);
      }
      k_ring.advance();
    };
    const auto load_v = [&](int n) {
      const uint32_t full = ptx::shared_address(&s.v_full[v_ring.slot]);
      ptx::mbarrier_wait(ptx::shared_address(&s.v_empty[v_ring.slot]), v_ring.parity ^ 1);
      ptx::mbarrier_arrive_expect(full, Tile::kKeyBytes);
      const uint32_t to = ptx::shared_address(s.v[v_ring.slot]);
#pragma unroll
      for (int c = 0; c < Tile::kColumnBlocks; ++c) {
        ptx::tma_load_4d(to + c * Tile::kBlockN * kColumnBlockBytes, &a.v_map, full,
                         c * kColumnBlock, first_key + n * Tile::kBlockN, kv_head * a.v_head_step,
                         batch * a.v_batch_step, often);
      }
      v_ring.advance();
    };
    const auto load_q = [&] {
      const uint32_t full = ptx::shared_address(&s.q_full[q_ring.slot]);
      ptx::mbarrier_wait(ptx::shared_address(&s.q_empty[q_ring.slot]), q_ring.parity ^ 1);
      ptx::mbarrier_arrive_expect(full, Tile::kQueryBytes);
      const uint32_t to = ptx::shared_address(s.q[q_ring.slot]);
#pragma unroll
      for (int c = 0; c < Tile::kColumnBlocks; ++c) {
        ptx::tma_load_4d(to + c * Tile::kBlockM * kColumnBlockBytes, &a.q_map, full,
                         c * kColumnBlock, first_query, work.place.head * a.q_head_step,
                         batch * a.q_batch_step, once);
      }
      q_ring.advance();
    };

    // K runs one block ahead of V, as the products do.
    load_k(blocks.hi - 1);
    load_q();
    if (blocks.hi - blocks.lo <= 2) want_next();
#pragma unroll 1
    for (int n = blocks.hi - 2; n >= blocks.lo; --n) {
      if (n == blocks.lo + 1) want_next();
      load_k(n);
      load_v(n + 1);
    }
    load_v(blocks.lo);
  }
}

}  // namespace llamatelemetry
