// The warpgroups of the Hopper kernel that compute: scores, online softmax and values of 64 query
// rows each.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/sm90/epilogue.cuh"
#include "attention/sm90/products.cuh"
#include "attention/sm90/softmax.cuh"
#include "attention/sm90/storage.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace llamatelemetry {

// One warpgroup: its 64 rows of each tile. Every branch around a ring advance or a wgmma must be
// provably warp-uniform: otherwise ptxas keeps ring state in ordinary registers and rebuilds each
// descriptor (benchmarks/notes/attention.md). Every step is inlined, as scores, weights and results
// live in registers.
template <typename T, typename Tile, MaskKind kMask>
struct Consumer {
  static constexpr int kBlockN = Tile::kBlockN;
  static constexpr int kTailBarrier = 1;
  static constexpr int kStoreBarrier = 2;  // and one for each further warpgroup

  const Sm90Args& a;
  Sm90Storage<Tile>& s;
  const AttentionParams& p;
  const int warp;  // the same in every lane, and known to be so by the shuffle
  const int group;
  const int lane;
  const int column;  // the thread's first of a block
  const float scale_log2;
  Ring<kWorkSlots> work_ring;
  Ring<Tile::kQueryStages> full_q_ring;
  Ring<Tile::kQueryStages> q_ring;  // the next to be given back
  Ring<Tile::kStages> k_ring;
  Ring<Tile::kStages> v_ring;
  float r_s[kBlockN / 2];
  uint32_t r_p[kBlockN / kDepth][4];
  float r_o[Tile::kHeadDim / 2];

  // What the steps share of a tile.
  struct State {
    uint8_t* queries;
    uint64_t q;        // their descriptor, of the warpgroup's rows
    KeyBlocks blocks;  // that the warpgroup's rows need
    TwoRows rows;
    ScoreTerms terms;
    int position;   // of the thread's first row among the keys
    int begins[2];  // keys that its rows see, from the thread's column 0 of key block 0 on
    int ends[2];
    float rescale[2];  // by how much what was accumulated so far is to be scaled
    float totals[2];   // what the thread's weights of the block add up to
    float scale[2];    // of the results
  };

  __device__ __forceinline__ Consumer(const Sm90Args& args, Sm90Storage<Tile>& storage)
      : a(args),
        s(storage),
        p(args.p.call),
        warp(__shfl_sync(0xffffffff, (threadIdx.x - kGroupThreads) / 32, 0)),
        group(warp / 4),
        lane(threadIdx.x % 32),
        column(2 * (lane % 4)),
        scale_log2(args.p.needs_score_rule ? 1.0f : args.p.scale_log2) {}

  __device__ __forceinline__ void run() {
    int next_slot = wait_tile();
#pragma unroll 1
    while (s.work[next_slot].first_row != kNoRow) {
      const int slot = next_slot;
      const TileWork<Tile>& work = s.work[slot];
      const KeyBlocks tile_blocks = work.blocks;
      State t;
      t.blocks = work.group_blocks[group];
      wait_queries(t);
      zero_tail(work, tile_blocks);
      t.rows = {{kNoRowMax, kNoRowMax}, {0.0f, 0.0f}, {}};
      t.rows.always[0] = t.rows.always[1] = a.p.needs_score_rule;
      if (t.blocks.hi > t.blocks.lo) {
        pass_blocks(tile_blocks.hi - t.blocks.hi);
        begin_scores(t.q);
        release_last_q();
        bound_rows(t, work);
        const bool adds = attend_blocks(t);
        // Before the values: they come after the next tile's queries.
        if constexpr (!Tile::kStoresInQueries) release_q();
        if constexpr (kMask == MaskKind::kLocal) zero_head(work.first_seen - t.blocks.lo * kBlockN);
        begin_values(adds);
        store_lse(a, work, warp, t.rows, t.scale);
        next_slot = wait_tile();
        wait_values();
        pass_blocks(t.blocks.lo - tile_blocks.lo);
      } else {
        pass_tile(tile_blocks);
        store_lse(a, work, warp, t.rows, t.scale);
        next_slot = wait_tile();
      }
      store_results(t, work);
      __syncwarp();
      release(s.work_empty[slot]);
    }
    if (lane == 0) ptx::bulk_wait_read<0>();  // shared memory outlives what is read of it
  }

  // ---- Barriers and rings ----

  __device__ __forceinline__ void release(uint64_t& barrier) {
    if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&barrier));
  }
  __device__ __forceinline__ void wait_k() {
    ptx::mbarrier_wait(ptx::shared_address(&s.k_full[k_ring.slot]), k_ring.parity);
  }
  __device__ __forceinline__ void wait_v() {
    ptx::mbarrier_wait(ptx::shared_address(&s.v_full[v_ring.slot]), v_ring.parity);
  }
  __device__ __forceinline__ void release_k() {
    release(s.k_empty[k_ring.slot]);
    k_ring.advance();
  }
  __device__ __forceinline__ void release_v() {
    release(s.v_empty[v_ring.slot]);
    v_ring.advance();
  }
  // Once the results that left by way of it are read.
  __device__ __forceinline__ void release_q() {
    if (Tile::kStoresInQueries && lane == 0) ptx::bulk_wait_read<0>();
    release(s.q_empty[q_ring.slot]);
    q_ring.advance();
  }
  // In a tile: the queries before, where they were not given back yet, which is where both buffers
  // were filled since.
  __device__ __forceinline__ void release_last_q() {
    if (Tile::kStoresInQueries && q_ring.slot == full_q_ring.slot) release_q();
  }
  // Until a tile is published. Returns where.
  __device__ __forceinline__ int wait_tile() {
    const int slot = work_ring.slot;
    ptx::mbarrier_wait(ptx::shared_address(&s.work_full[slot]), work_ring.parity);
    work_ring.advance();
    return slot;
  }
  __device__ __forceinline__ void wait_queries(State& t) {
    t.queries = s.q[full_q_ring.slot];
    t.q = ptx::k_major_descriptor(ptx::shared_address(t.queries) +
                                  group * kGroupRows * kColumnBlockBytes);
    ptx::mbarrier_wait(ptx::shared_address(&s.q_full[full_q_ring.slot]), full_q_ring.parity);
    full_q_ring.advance();
  }
  __device__ __forceinline__ void wait_values() {
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(r_o);
    release_v();
  }
  // Blocks of the tile that this warpgroup's rows do not need.
  __device__ __forceinline__ void pass_blocks(int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      wait_k();
      wait_v();
      __syncwarp();  // or the first lane gives back what another has not seen come
      release_k();
      release_v();
    }
  }

  // ---- Steps of a tile ----

  // A packed sequence's last block of values: the rows past its end hold another's, and 0 * NaN is
  // NaN.
  __device__ __forceinline__ void zero_tail(const TileWork<Tile>& work,
                                            const KeyBlocks& tile_blocks) {
    const bool has_tail = p.cu_seqlens_q != nullptr && tile_blocks.hi - tile_blocks.lo > 0 &&
                          tile_blocks.hi * kBlockN > work.window.num_keys;
    if (!has_tail) return;
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

  // The first `hidden` values of the next block, where no query of the sequence sees them: behind a
  // window they may be anything, and 0 * NaN is NaN. Warpgroups write the same zeros, so none
  // waits for another.
  __device__ __forceinline__ void zero_head(int hidden) {
    if (hidden <= 0) return;
    wait_v();
    constexpr int kChunks = kColumnBlockBytes / 16;
    const int bad = hidden * kChunks;
    for (int i = threadIdx.x % kGroupThreads; i < bad * Tile::kColumnBlocks; i += kGroupThreads) {
      const int block = i / bad;
      uint8_t* at = s.v[v_ring.slot] + block * kBlockN * kColumnBlockBytes + (i - block * bad) * 16;
      *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async_shared();
    ptx::named_barrier_sync(kStoreBarrier + group, kGroupThreads);
  }

  __device__ __forceinline__ void begin_scores(uint64_t q) {
    wait_k();
    ptx::wgmma_fence();
    multiply_keys<T, Tile>(r_s, q, ptx::k_major_descriptor(ptx::shared_address(s.k[k_ring.slot])));
  }
  __device__ __forceinline__ void begin_values(bool adds) {
    wait_v();
    ptx::wgmma_fence();
    multiply_values<T, Tile>(r_o, r_p,
                             ptx::mn_major_descriptor(ptx::shared_address(s.v[v_ring.slot]),
                                                      kBlockN * kColumnBlockBytes),
                             adds);
  }

  // What the thread's two rows see of the keys.
  __device__ __forceinline__ void bound_rows(State& t, const TileWork<Tile>& work) {
    t.terms = {a.p.scale_log2, a.p.cap_log2, a.p.cap_rate, work.slope};
    const int row = work.first_row + warp * kWarpRows + lane / 4;
    t.position = work.window.offset + row;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      t.ends[h] = window_end<kMask>(work.window, row + 8 * h) - column;
      t.begins[h] = window_begin<kMask>(work.window, row + 8 * h) - column;
    }
  }

  // Every block of the tile but the last product with values. Returns whether r_o holds something
  // of this tile: that product then adds to it.
  __device__ __forceinline__ bool attend_blocks(State& t) {
    int n = t.blocks.hi - 1;
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(r_s);
    release_k();
    exponentiate_block(t, n, std::true_type{}, true);
    t.rows.sum[0] = t.totals[0];
    t.rows.sum[1] = t.totals[1];
    bool raises = t.rows.any_raises();
    pack_weights<T, kBlockN>(r_s, r_p);
    bool adds = false;

    // The scores of block n, beside the values of block n + 1.
#pragma unroll 1
    for (--n; n >= t.blocks.lo; --n) {
      begin_scores(t.q);
      begin_values(adds);
      adds = true;
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(r_s);
      exponentiate_block(t, n, std::bool_constant<kMask != MaskKind::kFull>{}, raises);
      // The vote needs every weight: it keeps the compiler from waiting first and exponentiating
      // only then. The wait is under no condition, as all warps of a group must come to the same
      // one.
      const bool fits = t.totals[0] + t.totals[1] <= kMaxWeightSum<T>;
      const bool again = !__all_sync(0xffffffff, fits);
      const int k_slot = k_ring.slot;
      if (!again) release(s.k_empty[k_slot]);
      k_ring.advance();
      if (again || raises) __syncwarp();
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(r_o);
      if (again || raises) raises = rescale_results(t, k_slot, again, raises);
      t.rows.sum[0] += t.totals[0];
      t.rows.sum[1] += t.totals[1];
      release_v();
      pack_weights<T, kBlockN>(r_s, r_p);
    }
    return adds;
  }

  // The scores of block n to weights. raises: whether the row maxima are raised before. One piece
  // of code for blocks that are masked and others: two, and those of three warpgroups at different
  // places of the tile, push each other out of the instruction cache.
  template <typename MayBeMasked>
  __device__ __forceinline__ void exponentiate_block(State& t, int n, MayBeMasked, bool raises) {
    if (a.p.needs_score_rule) {
      apply_score_terms<kBlockN>(r_s, t.terms, t.position, n * kBlockN + column);
    }
    if (MayBeMasked::value &&
        (n >= t.blocks.right_full || (kMask == MaskKind::kLocal && n < t.blocks.left_full))) {
      const int block_begins[2] = {t.begins[0] - n * kBlockN, t.begins[1] - n * kBlockN};
      const int block_ends[2] = {t.ends[0] - n * kBlockN, t.ends[1] - n * kBlockN};
      mask_scores<kMask, kBlockN>(r_s, block_begins, block_ends);
    }
    if (raises) raise_row_max<kBlockN>(r_s, t.rows, scale_log2, t.rescale);
    exponentiate<kBlockN>(r_s, t.rows, scale_log2, t.totals);
    ptx::wgmma_hold(r_s);  // packed after the exponentials, not within: that took more registers
  }

  // Where weights outgrew what holds them (again) or row maxima were raised: brings the results so
  // far to the new maxima. Returns whether the next block raises them first.
  __device__ __forceinline__ bool rescale_results(State& t, int k_slot, bool again, bool raises) {
    if (!raises) t.rescale[0] = t.rescale[1] = 1.0f;
    if (again) {
      exponentiate_again(t, k_slot);
      release(s.k_empty[k_slot]);
    }
    const bool shrink = t.rescale[0] != 1.0f || t.rescale[1] != 1.0f;
    if (__any_sync(0xffffffff, shrink)) rescale_rows(r_o, t.rescale);
    return t.rows.any_raises();
  }

  // Of weights that are too large: scales them down where float32 holds them. Else multiplies their
  // scores again, and from here on their row maxima are raised before they are exponentiated.
  __device__ __forceinline__ void exponentiate_again(State& t, int k_slot) {
    TwoRows& rows = t.rows;
    bool shrinks[2];
    bool lost[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool too_large = quad_any(!(t.totals[h] <= kMaxWeightSum<T>)) & !rows.always[h];
      lost[h] = quad_any(!(t.totals[h] < kLostWeight)) & too_large;
      shrinks[h] = too_large & !lost[h];
    }
    shrink_weights<kBlockN>(r_s, rows, t.totals, shrinks, t.rescale);
    if (__any_sync(0xffffffff, lost[0] || lost[1])) {
      rows.always[0] |= lost[0];
      rows.always[1] |= lost[1];
      multiply_keys_again<T, Tile>(
          r_s, lost, ptx::shared_address(t.queries) + warp * kWarpRows * kColumnBlockBytes,
          ptx::shared_address(s.k[k_slot]));
      exponentiate_lost<kBlockN>(r_s, rows, scale_log2, t.totals, lost, t.rescale);
    }
  }

  // A tile of which this warpgroup's rows see nothing.
  __device__ __forceinline__ void pass_tile(const KeyBlocks& tile_blocks) {
    __syncwarp();
    if constexpr (Tile::kStoresInQueries) {
      release_last_q();
    } else {
      release_q();
    }
    pass_blocks(tile_blocks.hi - tile_blocks.lo);
#pragma unroll
    for (int i = 0; i < Tile::kHeadDim / 2; ++i) r_o[i] = 0.0f;
  }

  __device__ __forceinline__ void store_results(const State& t, const TileWork<Tile>& work) {
    if (a.num_parts > 1) return store_part(a, work, warp, r_o, t.scale);
    if constexpr (Tile::kStoresInQueries) {
      // Every warp's products with these queries are done.
      ptx::named_barrier_sync(kStoreBarrier + group, kGroupThreads);
      store_rows<T, Tile>(a, work, warp, t.queries, r_o, t.scale);
    } else {
      store_rows<T, Tile>(a, work, warp, s.out, r_o, t.scale);
    }
  }
};

}  // namespace llamatelemetry
