// The thread of the Hopper kernel that schedules: which tile this block works on next, and which
// keys its rows need.
#pragma once

#include <cstdint>

#include "attention/sm90/storage.cuh"
#include "ptx/tma.cuh"

namespace llamatelemetry {

// Of the sequences that this kernel serves.
__device__ inline TileSchedule<int> schedule_of(const Sm90Args& a) {
  const AttentionParams& p = a.p.call;
  TileSchedule<int> schedule = a.schedule;
  if (p.served != nullptr) {
    schedule.num_heads = *p.served * static_cast<int>(p.num_heads_q);
    schedule.num_tiles = schedule.num_heads * schedule.num_row_blocks;
  }
  return schedule;
}

// tile: of them, parts counted as one.
__device__ inline TilePlace served_place(const AttentionParams& p,
                                         const TileSchedule<int>& schedule, int tile) {
  TilePlace place = place_of_tile(schedule, tile, static_cast<int>(p.num_heads_q));
  if (p.served != nullptr) place.sequence = p.served[1 + place.sequence];
  return place;
}

// One thread: schedules the tiles. A tile is fetched late: then the tiles at work are neighbours in
// the schedule, which is what keeps keys and values in L2, and nobody sits on a tile that another
// block could have begun.
template <typename Tile, MaskKind kMask>
__device__ void publish_tiles(const Sm90Args& a, Sm90Storage<Tile>& s) {
  const AttentionParams& p = a.p.call;
  const int num_blocks = gridDim.x;
  Ring<kWorkSlots> ring;
  Ring<1> wanted;
  const auto wait_slot = [&] {
    ptx::mbarrier_wait(ptx::shared_address(&s.work_empty[ring.slot]), ring.parity ^ 1);
  };
  const auto publish = [&] {
    ptx::mbarrier_arrive(ptx::shared_address(&s.work_full[ring.slot]));
    ring.advance();
  };
  const TileSchedule<int> schedule = schedule_of(a);
  const int num_tiles = schedule.num_tiles * a.num_parts;
  const auto fetch = [&] {
    return num_blocks < num_tiles ? num_blocks + atomicAdd(p.tile_counter, 1) : num_blocks;
  };

#pragma unroll 1
  for (int tile = blockIdx.x; tile < num_tiles; tile = fetch()) {
    const int part = a.num_parts > 1 ? tile % a.num_parts : 0;
    const TilePlace place = served_place(p, schedule, a.num_parts > 1 ? tile / a.num_parts : tile);
    const SequenceSpan sequence = sequence_span(p, place.sequence);
    const auto num_queries = static_cast<int>(sequence.num_queries);
    const auto num_keys = static_cast<int>(sequence.num_keys);
    // Keys past the table are in no page.
    const int64_t capacity = p.k.page_size > 0 ? p.seqlen_k : sequence.num_keys;
    int first_row = place.row_block * Tile::kBlockM;
    if (first_row >= num_queries) continue;
    if constexpr (kMask != MaskKind::kFull) {
      // Groups that lack rows are the first, whose rows would see the fewest keys.
      const int past = num_queries % Tile::kBlockM;
      if (past > 0) first_row -= (Tile::kBlockM - past) / kGroupRows * kGroupRows;
    }
    Window window{static_cast<int>(p.window_left), static_cast<int>(p.window_right),
                  static_cast<int>(min(sequence.num_keys, capacity)), num_keys - num_queries};
    // Keys in front of the first that any query sees: dense ones are none of the sequence's here,
    // those in pages keep their places.
    const int hidden = window_begin<kMask>(window, 0);
    const bool paged = p.k.page_size > 0;
    if (!paged) {
      window.num_keys -= hidden;
      window.offset -= hidden;
    }
    const auto blocks_of_rows = [&](int first, int num_rows) {
      return key_blocks<kMask, Tile::kBlockN>(window, max(first, 0),
                                              min(first + num_rows, num_queries) - 1);
    };
    wait_slot();
    TileWork<Tile>& work = s.work[ring.slot];
    work.blocks = blocks_of_rows(first_row, Tile::kBlockM);
    const BlockRange range = range_of_part(work.blocks, part, a.num_parts);
    work.blocks = within(work.blocks, range);
#pragma unroll
    for (int group = 0; group < Tile::kConsumers; ++group) {
      work.group_blocks[group] =
          within(blocks_of_rows(first_row + group * kGroupRows, kGroupRows), range);
    }
    work.window = window;
    work.first_row = first_row;
    work.num_queries = num_queries;
    work.head = place.head;
    work.sequence = place.sequence;
    work.batch = p.cu_seqlens_q != nullptr ? 0 : place.sequence;
    work.first_query = static_cast<int>(sequence.first_query);
    work.first_key = static_cast<int>(sequence.first_key) + (paged ? 0 : hidden);
    work.first_seen = paged ? hidden : 0;
    work.part = part;
    work.sink = p.sinks == nullptr || part > 0 ? -INFINITY : p.sinks[place.head] * kLog2E;
    work.slope = p.alibi_slopes == nullptr
                     ? 0.0f
                     : p.alibi_slopes[place.sequence * p.alibi_batch_stride + place.head];
    publish();
    ptx::mbarrier_wait(ptx::shared_address(&s.work_wanted), wanted.parity);
    wanted.advance();
  }
  wait_slot();
  s.work[ring.slot].first_row = kNoRow;
  publish();
}

}  // namespace llamatelemetry
