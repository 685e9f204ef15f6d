// The warp of the Hopper kernel that copies queries, keys and values into shared memory.
#pragma once

#include <cstdint>

#include "attention/sm90/storage.cuh"
#include "ptx/tma.cuh"

namespace llamatelemetry {

// The next tile is fetched this many blocks of keys before the last one of this tile is asked for.
constexpr int kFetchAheadBlocks = 2;

// Copies what the tiles need, as far ahead as the rings allow. K runs one block ahead of V, as the
// products do, and on into the next tile. One thread; or one warp where keys lie in pages, so that
// each lane finds one of a block's pages and asks for its rows.
template <typename Tile, bool kPaged>
struct Producer {
  // What of a tile is copied.
  struct Copies {
    KeyBlocks blocks;
    int num_keys;
    int first_query;
    int first_key;
    int head;  // of q
    int kv_head;
    int batch;
    const int32_t* table;  // of the sequence's pages
    __device__ bool has_keys() const { return blocks.hi > blocks.lo; }
  };

  const Sm90Args& a;
  Sm90Storage<Tile>& s;
  const AttentionParams& p;
  Ring<kWorkSlots> work_ring;
  Ring<Tile::kQueryStages> q_ring;
  Ring<Tile::kStages> k_ring;
  Ring<Tile::kStages> v_ring;
  const uint64_t once;  // policies of L2
  const uint64_t often;
  const int group_size;
  const int lane;
  const bool leads;

  __device__ __forceinline__ Producer(const Sm90Args& args, Sm90Storage<Tile>& storage)
      : a(args),
        s(storage),
        p(args.p.call),
        once(ptx::policy_evict_first()),
        often(ptx::policy_evict_last()),
        group_size(static_cast<int>(p.num_heads_q / p.num_heads_kv)),
        lane(kPaged ? threadIdx.x % 32 : 0),
        leads(lane == 0) {}

  __device__ __forceinline__ void run() {
    Copies tile;
    bool has_tile = next_tile(tile);
    if (has_tile) {
      if (tile.has_keys()) load_k(tile, tile.blocks.hi - 1);
      load_q(tile);
    }
#pragma unroll 1
    while (has_tile) {
      const KeyBlocks blocks = tile.blocks;
      const int wanted_at = min(blocks.lo + kFetchAheadBlocks, blocks.hi - 1);
      if (wanted_at >= blocks.hi - 1) want_next();
#pragma unroll 1
      for (int n = blocks.hi - 2; n >= blocks.lo; --n) {
        if (n == wanted_at) want_next();
        load_k(tile, n);
        load_v(tile, n + 1);
      }
      // The next tile's first keys before this one's last values, and its queries too if they have
      // room: else they wait until these values are multiplied.
      Copies next;
      has_tile = next_tile(next);
      constexpr bool kHasRoom = Tile::kQueryStages > 1;
      if (has_tile && next.has_keys()) load_k(next, next.blocks.hi - 1);
      if (kHasRoom && has_tile) load_q(next);
      if (tile.has_keys()) load_v(tile, blocks.lo);
      if (!kHasRoom && has_tile) load_q(next);
      tile = next;
    }
  }

  static __device__ __forceinline__ void sync() {
    if constexpr (kPaged) __syncwarp();
  }
  __device__ __forceinline__ void want_next() {
    if (leads) ptx::mbarrier_arrive(ptx::shared_address(&s.work_wanted));
  }

  // The next buffer of a ring, as soon as it is empty: copy(to, full) asks for what fills it.
  template <typename AnyRing, typename Buffers, typename Barriers, typename Copy>
  __device__ __forceinline__ void fill(AnyRing& ring, Buffers& buffers, Barriers& filled,
                                       Barriers& emptied, Copy copy) {
    const uint32_t full = ptx::shared_address(&filled[ring.slot]);
    ptx::mbarrier_wait(ptx::shared_address(&emptied[ring.slot]), ring.parity ^ 1);
    if (leads) ptx::mbarrier_arrive_expect(full, sizeof(buffers[0]));
    sync();
    copy(ptx::shared_address(buffers[ring.slot]), full);
    ring.advance();
  }

  // A box of one head's rows from token on, to parts of part_rows rows.
  __device__ __forceinline__ void copy_rows(const CUtensorMap& map, uint32_t to, uint32_t full,
                                            int part_rows, int token, int head, int batch,
                                            uint64_t policy) {
#pragma unroll
    for (int c = 0; c < Tile::kColumnBlocks; ++c) {
      ptx::tma_load_4d(to + c * part_rows * kColumnBlockBytes, &map, full, c * kColumnBlock, token,
                       head, batch, policy);
    }
  }

  // Block n of a tile's keys or values. What is in no page lies outside of the map, or anywhere in
  // it where all pages are one: it is masked, and its values are zeroed.
  __device__ __forceinline__ void copy_block(const CUtensorMap& map, uint32_t to, uint32_t full,
                                             const Copies& tile, int n, int head_step,
                                             int batch_step) {
    const int first = n * Tile::kBlockN;
    const int head = tile.kv_head * head_step;
    if constexpr (!kPaged) {
      copy_rows(map, to, full, Tile::kBlockN, tile.first_key + first, head, tile.batch * batch_step,
                often);
    } else if (const int row = lane * a.keys_at_once; row < Tile::kBlockN) {
      const int key = first + row;
      const auto page_size = static_cast<int>(p.k.page_size);
      const int page = key < tile.num_keys ? tile.table[key / page_size] : -1;
      copy_rows(map, to + row * kColumnBlockBytes, full, Tile::kBlockN, key % page_size, head,
                page * batch_step, often);
    }
  }

  __device__ __forceinline__ void load_k(const Copies& tile, int n) {
    fill(k_ring, s.k, s.k_full, s.k_empty, [&](uint32_t to, uint32_t full) {
      copy_block(a.k_map, to, full, tile, n, a.k_head_step, a.k_batch_step);
    });
  }
  __device__ __forceinline__ void load_v(const Copies& tile, int n) {
    fill(v_ring, s.v, s.v_full, s.v_empty, [&](uint32_t to, uint32_t full) {
      copy_block(a.v_map, to, full, tile, n, a.v_head_step, a.v_batch_step);
    });
  }
  __device__ __forceinline__ void load_q(const Copies& tile) {
    fill(q_ring, s.q, s.q_full, s.q_empty, [&](uint32_t to, uint32_t full) {
      if (leads) {
        copy_rows(a.q_map, to, full, Tile::kBlockM, tile.first_query, tile.head * a.q_head_step,
                  tile.batch * a.q_batch_step, once);
      }
    });
  }

  // Whether there is one more tile.
  __device__ __forceinline__ bool next_tile(Copies& tile) {
    const int slot = work_ring.slot;
    ptx::mbarrier_wait(ptx::shared_address(&s.work_full[slot]), work_ring.parity);
    const TileWork<Tile>& work = s.work[slot];
    const int first_row = work.first_row;
    tile = {.blocks = work.blocks,
            .num_keys = work.window.num_keys,
            .first_query = work.first_query + first_row,
            .first_key = work.first_key,
            .head = work.head,
            .kv_head = work.head / group_size,
            .batch = work.batch,
            .table = p.block_table + work.sequence * p.block_table_stride};
    sync();
    if (leads) ptx::mbarrier_arrive(ptx::shared_address(&s.work_empty[slot]));
    work_ring.advance();
    return first_row != kNoRow;
  }
};

}  // namespace llamatelemetry
