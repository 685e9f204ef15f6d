// The copying warp of the Hopper kernel.
#pragma once

#include <climits>
#include <cstdint>

#include "attention/flash_sm90_tile.cuh"
#include "ptx/tma.cuh"

namespace llamatelemetry {

// One thread: copies what the tiles need, as far ahead as the rings allow.
template <typename Tile, FlashMask kMask>
__device__ void copy_tiles(const FlashSm90Args& a, FlashShared<Tile>& s) {
  const FlashAttnParams& p = a.p.call;
  Ring<kWorkSlots> work_ring;
  Ring<Tile::kQueryStages> q_ring;
  Ring<Tile::kStages> k_ring;
  Ring<Tile::kStages> v_ring;
  const uint64_t once = ptx::policy_evict_first();
  const uint64_t often = ptx::policy_evict_last();
  const int group = static_cast<int>(p.num_heads_q / p.num_heads_kv);

  const auto announce = [&](const FlashTileWork& work) {
    const int slot = work_ring.slot;
    ptx::mbarrier_wait(ptx::shared_address(&s.work_empty[slot]), work_ring.parity ^ 1);
    s.work[slot] = work;
    ptx::mbarrier_arrive(ptx::shared_address(&s.work_full[slot]));
    work_ring.advance();
  };
  // Where every tile takes the same time they go round; else who is done first takes the next.
  const bool in_turn = kMask == FlashMask::kFull && p.cu_seqlens_q == nullptr;
  int last_tile = blockIdx.x;
  const auto next_work = [&](bool is_first) {
    FlashTileWork work{};
    do {
      if (!is_first)
        last_tile = in_turn ? last_tile + gridDim.x
                    : static_cast<int>(gridDim.x) < a.schedule.num_tiles
                        ? gridDim.x + atomicAdd(p.tile_counter, 1)
                        : INT_MAX;
      is_first = false;
      work.first_row = -1;
      if (last_tile >= a.schedule.num_tiles) break;
      work = work_of_tile<Tile>(a, last_tile);
    } while (work.first_row >= work.num_queries);
    return work;
  };
  // The next tile's first loads come at once and from afar: into L2 with them beforehand.
  const auto warm_l2 = [&](const FlashTileWork& work) {
    if (work.first_row < 0) return;
    const KeyBlocks blocks = blocks_of_rows<Tile, kMask>(work, work.first_row, Tile::kBlockM);
    const int batch = p.cu_seqlens_q == nullptr ? work.place.index : 0;
    const int kv_head = work.place.head / group;
    const int first_key = static_cast<int>(work.sequence.first_key);
#pragma unroll
    for (int c = 0; c < Tile::kColumnBlocks; ++c) {
      ptx::tma_prefetch_4d(&a.q_map, c * kColumnBlock,
                           static_cast<int>(work.sequence.first_query) + work.first_row,
                           work.place.head * a.q_head_step, batch * a.q_batch_step);
#pragma unroll 1
      for (int n = blocks.hi - 1; n >= max(blocks.lo, blocks.hi - 2); --n) {
        ptx::tma_prefetch_4d(&a.k_map, c * kColumnBlock, first_key + n * Tile::kBlockN,
                             kv_head * a.k_head_step, batch * a.k_batch_step);
        ptx::tma_prefetch_4d(&a.v_map, c * kColumnBlock, first_key + n * Tile::kBlockN,
                             kv_head * a.v_head_step, batch * a.v_batch_step);
      }
    }
  };

  FlashTileWork ahead = next_work(true);
#pragma unroll 1
  while (ahead.first_row >= 0) {
    const FlashTileWork work = ahead;
    announce(work);
    const KeyBlocks blocks = blocks_of_rows<Tile, kMask>(work, work.first_row, Tile::kBlockM);
    if (blocks.hi <= blocks.lo) {
      ahead = next_work(false);
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

    const int look_ahead = min(blocks.hi - 2, blocks.lo + 4);
    // K runs one block ahead of V, as the products do.
    load_k(blocks.hi - 1);
    load_q();
#pragma unroll 1
    for (int n = blocks.hi - 2; n >= blocks.lo; --n) {
      load_k(n);
      load_v(n + 1);
      if (n == look_ahead) {
        ahead = next_work(false);
        warm_l2(ahead);
      }
    }
    if (blocks.hi - 2 < blocks.lo) ahead = next_work(false);
    load_v(blocks.lo);
  }
  announce(ahead);
}

}  // namespace llamatelemetry
