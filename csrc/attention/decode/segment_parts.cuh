// Keys divided among blocks where there are no more segments than blocks: each segment into parts
// of its own that differ by at most one tile, a block each. No block then works on two segments,
// which would wait for memory once more. And what blocks will read is on its way to L2 before the
// kernel ahead has ended.
#pragma once

#include <climits>

#include "attention/decode/plan.cuh"
#include "ptx/prefetch.cuh"
#include "tile/dependent_launch.cuh"

namespace llamatelemetry::decode {

// A block's part: tiles of a segment of a sequence.
struct SegmentPart {
  bool exists;  // whether the keys are divided so; else in runs, plan.cuh
  bool is_idle;
  int index;                    // of the sequence
  int which;                    // of its segments
  int num_segments, num_tiles;  // of the sequence, of a segment
  TileRange tiles;
  int first_block, last_block;  // of the segment
};

// Whether the call is one whose keys may be divided so: each sequence has its lane.
template <int kRows>
__device__ bool may_cut_segments(const AttentionParams& p) {
  const int64_t row_tiles = (p.seqlen_q * p.group_size + kRows - 1) / kRows;
  return p.batch <= kWarpSize && p.batch * p.num_heads_kv * row_tiles <= gridDim.x;
}

// What a lane knows of the sequence that it stands for; the same for all of a dense batch.
struct QueriesAndKeys {
  int64_t num_queries, num_keys;
  __device__ bool operator!=(const QueriesAndKeys& other) const {
    return num_queries != other.num_queries || num_keys != other.num_keys;
  }
};

__device__ inline QueriesAndKeys counts_of_lane(const AttentionParams& p) {
  const auto index = static_cast<int>(threadIdx.x % kWarpSize);
  if (index >= p.batch) return {0, 0};
  const SequenceSpan span = sequence_span(p, index);
  return {span.num_queries, span.num_keys};
}
// The same before the kernels ahead have ended: a guess, as they may yet write it. Past L1, which
// would keep it.
__device__ inline QueriesAndKeys guessed_counts_of_lane(const AttentionParams& p) {
  const auto index = static_cast<int>(threadIdx.x % kWarpSize);
  if (index >= p.batch) return {0, 0};
  if (p.cu_seqlens_q == nullptr) return {p.seqlen_q, p.seqlen_k};
  const auto length = [](const int32_t* starts, int at) {
    return int64_t{__ldcg(starts + at + 1)} - __ldcg(starts + at);
  };
  const auto within = [](int64_t count, int64_t most) { return max(int64_t{0}, min(count, most)); };
  return {
      within(served_queries(p.plan, length(p.cu_seqlens_q, index)), p.seqlen_q),
      within(p.k.page_size > 0 ? __ldcg(p.cache_seqlens + index) : length(p.cu_seqlens_k, index),
             p.seqlen_k)};
}

// The sum of all lanes' values. kCapability: of the code; from 8.0 on it is one instruction.
template <int kCapability, typename Int>
__device__ Int sum_of_lanes(Int value) {
  if constexpr (kCapability >= 80) {
    return __reduce_add_sync(~0u, value);
  } else {
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
  }
}

// The part of this block. Every warp finds it for itself, a lane each sequence.
template <Config kConfig>
__device__ SegmentPart part_of_block(const AttentionParams& p, const QueriesAndKeys& counts) {
  const Sequence<false, kConfig.row_tile> sequence(
      p, SequenceSpan{0, counts.num_queries, 0, counts.num_keys});
  const int tiles = sequence.tiles;
  const int segments =
      counts.num_queries > 0 ? sequence.row_tiles * static_cast<int>(p.num_heads_kv) : 0;
  const int total = sum_of_lanes<kConfig.capability>(segments * tiles);
  // Up to kLongestShortRun tiles a block one block a multiprocessor: more parts take longer to
  // combine than so many tiles to read.
  int places = static_cast<int>(gridDim.x);
  if (total <= p.plan.num_sms * kLongestShortRun) places = min(places, p.plan.num_sms);
  const int least = max(1, (total + places - 1) / places);
  // Parts so much longer than runs would be cost more than what they save.
  const int most = least + 1 + least / 16, step = 1 + least / 64;
  const auto parts_of = [&](int longest) { return (tiles + longest - 1) / longest; };
  int longest = least;
  while (longest <= most &&
         sum_of_lanes<kConfig.capability>(segments * parts_of(longest)) > places) {
    longest += step;
  }
  SegmentPart part{.exists = longest <= most, .is_idle = true};
  if (!part.exists) return part;
  const int parts = parts_of(longest);
  const int end = inclusive_scan(segments * parts);
  const int block = static_cast<int>(blockIdx.x);
  const unsigned past = __ballot_sync(~0u, end > block);
  if (past == 0) return part;
  part.is_idle = false;
  part.index = __ffs(static_cast<int>(past)) - 1;
  const auto held = [&](int value) { return __shfl_sync(~0u, value, part.index); };
  const int num_parts = held(parts);
  part.num_tiles = held(tiles);
  part.num_segments = held(segments);
  const int first_of_sequence = held(end) - part.num_segments * num_parts;
  part.which = (block - first_of_sequence) / num_parts;
  part.first_block = first_of_sequence + part.which * num_parts;
  part.last_block = part.first_block + num_parts - 1;
  const int at = block - part.first_block;
  const int quotient = part.num_tiles / num_parts, remainder = part.num_tiles % num_parts;
  part.tiles.begin = at * quotient + min(at, remainder);
  part.tiles.end = part.tiles.begin + quotient + (at < remainder ? 1 : 0);
  return part;
}

// Brings the first keys and values of this block's part into L2. Reads no more than where pages
// lie, as a guess: what is read of them counts only after wait_for_predecessors. Heads of a token
// lie side by side in memory, and the blocks of the other heads share its tokens.
template <int kRows, int kNumThreads, typename Element>
__device__ void prefetch_part(const AttentionParams& p, const QueriesAndKeys& counts,
                              const SegmentPart& part) {
  // 8 MB of all blocks, about what memory brings while the kernel ahead ends. With four tiles the
  // copies were in its way: benchmarks/notes/attention.md.
  constexpr int kTiles = 1;
  if (!part.exists || part.is_idle) return;
  if (p.k.rows.head_stride != p.head_dim || p.v.rows.head_stride != p.head_dim) return;
  const bool is_paged = p.k.page_size > 0;
  if (!is_paged && p.cu_seqlens_k != nullptr) return;  // where keys lie is a guess
  const auto held = [&](int64_t value) { return __shfl_sync(~0u, value, part.index); };
  const Sequence<false, kRows> sequence(
      p, SequenceSpan{0, held(counts.num_queries), 0, held(counts.num_keys)});
  const int first = (sequence.begin / kTileKeys + part.tiles.begin) * kTileKeys;
  const int num_tiles = min(kTiles, part.tiles.end - part.tiles.begin);
  const int end = min(sequence.end, first + num_tiles * kTileKeys);
  const auto num_bytes =
      static_cast<uint32_t>(p.num_heads_kv * p.head_dim * int64_t{sizeof(Element)});
  // Neighbours in another warp: an instruction takes one address.
  constexpr int kWarps = kNumThreads / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int i = lane * kWarps + warp; i < kTiles * kTileKeys; i += kNumThreads) {
    const int key = first + part.which + i * part.num_segments;
    if (key < sequence.begin || key >= end) continue;
    int64_t page = part.index, slot = key;
    if (is_paged) {
      const int page_size = static_cast<int>(min(p.k.page_size, int64_t{INT_MAX}));
      page = __ldcg(p.block_table + part.index * p.block_table_stride + key / page_size);
      slot = key % page_size;
      if (page < 0 || page >= p.num_pages) continue;
    }
    const auto at = [&](const Heads& rows) {
      return static_cast<const Element*>(rows.data) + page * rows.batch_stride +
             slot * rows.token_stride;
    };
    ptx::prefetch_bulk_l2(at(p.k.rows), num_bytes);
    ptx::prefetch_bulk_l2(at(p.v.rows), num_bytes);
  }
}

// Waits for the kernels ahead, and says which part is this block's.
template <Config kConfig, int kNumThreads, typename Element>
__device__ SegmentPart wait_for_part(const AttentionParams& p) {
  constexpr int kRows = kConfig.row_tile;
  if (!may_cut_segments<kRows>(p)) {
    wait_for_predecessors();
    return {.exists = false};
  }
  const QueriesAndKeys guess = guessed_counts_of_lane(p);
  const SegmentPart guessed = part_of_block<kConfig>(p, guess);
  prefetch_part<kRows, kNumThreads, Element>(p, guess, guessed);
  wait_for_predecessors();
  const QueriesAndKeys counts = counts_of_lane(p);
  if (!__any_sync(~0u, counts != guess)) return guessed;
  return part_of_block<kConfig>(p, counts);
}

}  // namespace llamatelemetry::decode
