// How the keys of a decode step are divided among blocks, on the device: a replay of a CUDA graph
// may come with other lengths, its grid stays.
//
// A sequence gives (kv heads * row tiles) segments, each of `tiles` tiles of keys. The tiles of all
// segments, in order, are cut into runs that differ by at most one tile, so that a long sequence
// beside short ones does not set the time. Where a run ends inside a segment the next block goes on
// with it, and the last block of the segment combines the parts. Where segments are few they are
// cut one by one instead: segment_parts.cuh. Key heads may have blocks of their own, which cut them
// in the same places: Lanes.
//
// kFixed: the caller says where segments are cut, and runs are made of whole parts. Then what a
// sequence gets depends on no other, bit for bit. So a unit of the plan is a tile, or such a part.
//                                                       (Stream-K: Osama et al. 2023, for GEMM)
#pragma once

#include "attention/decode/config.h"
#include "attention/params.h"
#include "tile/reduce.cuh"

namespace llamatelemetry::decode {

// Tiles [begin, end) of a segment.
struct TileRange {
  int begin, end;
};

// One sequence as the plan sees it. kRows: of a row tile.
template <bool kFixed, int kRows>
struct Sequence {
  int first_query;
  int num_queries;
  int64_t first_key;  // dense and packed: in k and v
  int num_keys;
  int begin, end;  // the keys that any query sees
  int tiles;       // from the one that holds begin on; at least 1, so that every row is written
  int row_tiles;   // of (query, head of the group) rows
  int units;       // of a segment
  // kFixed: a part's tiles, and how many of the first part's lie before the tile of `begin`.
  int part_tiles, tiles_before;

  __device__ Sequence(const AttentionParams& p, int index) : Sequence(p, sequence_span(p, index)) {}
  __device__ Sequence(const AttentionParams& p, const SequenceSpan& span) {
    first_query = static_cast<int>(span.first_query);
    num_queries = static_cast<int>(span.num_queries);
    first_key = span.first_key;
    num_keys = static_cast<int>(span.num_keys);
    begin = static_cast<int>(keys_of(p, 0).begin);
    end = static_cast<int>(keys_of(p, num_queries - 1).end);
    tiles = max(1, (end + kTileKeys - 1) / kTileKeys - begin / kTileKeys);
    row_tiles = (num_queries * static_cast<int>(p.group_size) + kRows - 1) / kRows;
    units = tiles;
    if constexpr (kFixed) {
      const AttentionPlan& plan = p.plan;
      part_tiles = plan.split_keys > 0 ? plan.split_keys / kTileKeys
                                       : (tiles + plan.num_splits - 1) / plan.num_splits;
      tiles_before = plan.split_keys > 0 ? begin / kTileKeys % part_tiles : 0;
      units = (tiles_before + tiles + part_tiles - 1) / part_tiles;
    }
  }
  // kFixed: of a part.
  __device__ TileRange tiles_of(int unit) const {
    const int first = unit * part_tiles - tiles_before;
    return {max(first, 0), min(first + part_tiles, tiles)};
  }
  __device__ KeyRange keys_of(const AttentionParams& p, int query) const {
    return p.k.page_size > 0
               ? paged_keys(p, num_keys, num_queries, query)
               : window_keys(p.window_left, p.window_right, num_keys, num_queries, query);
  }
  // Units of a lane: Lanes.
  __device__ int work(const AttentionParams& p, int num_lanes) const {
    return num_queries > 0 ? units * row_tiles * (static_cast<int>(p.num_heads_kv) / num_lanes) : 0;
  }
};

// Key heads of a token lie side by side in memory, and are read side by side: a group of
// neighbouring blocks has the same run of tokens, a lane each. Lanes are a power of two that
// divides both the key heads and the blocks; each has num_heads_kv / count of a sequence's heads.
struct Lanes {
  int count, own, group;  // own, group: of this block
  // are_used: else there is one, of all heads.
  __device__ Lanes(const AttentionParams& p, bool are_used) {
    const int both = static_cast<int>(p.num_heads_kv) | static_cast<int>(gridDim.x);
    count = are_used ? both & -both : 1;
    const int shift = 31 - __clz(count);
    own = static_cast<int>(blockIdx.x) & (count - 1);
    group = static_cast<int>(blockIdx.x) >> shift;
  }
  __device__ int num_groups() const { return static_cast<int>(gridDim.x) / count; }
  __device__ int block_of(int of_group) const { return of_group * count + own; }
};

// The run of group b of blocks is the lane's units [first_of(b), first_of(b + 1)).
struct Runs {
  int num_runs, quotient, remainder;  // the first `remainder` runs have one unit more

  Runs() = default;
  __device__ Runs(int total, int num_blocks, int shortest)
      : num_runs(max(1, min(num_blocks, total / shortest))),
        quotient(total / num_runs),
        remainder(total % num_runs) {}
  __device__ int first_of(int block) const { return block * quotient + min(block, remainder); }
  __device__ int block_of(int unit) const {
    const int longer = remainder * (quotient + 1);
    return unit < longer ? unit / (quotient + 1) : remainder + (unit - longer) / quotient;
  }
};

__device__ inline int inclusive_scan(int value) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int left = __shfl_up_sync(~0u, value, step);
    if (threadIdx.x % kWarpSize >= step) value += left;
  }
  return value;
}

// Looks through the sequences, a lane each; every warp does so for itself.
template <bool kFixed, int kRows>
class Plan {
 public:
  __device__ Plan(const AttentionParams& p, int num_lanes) : p_(p), num_lanes_(num_lanes) {}

  __device__ int total_units() const {
    int sum = 0;
    for (int first = 0; first < p_.batch; first += kWarpSize) sum += work_of_lane(first);
    return __shfl_sync(~0u, inclusive_scan(sum), kWarpSize - 1);
  }
  // The sequence that holds a unit, and the first unit of that sequence.
  __device__ int find(int unit, int* first_unit) const {
    int before = 0;
    for (int first = 0; first < p_.batch; first += kWarpSize) {
      const int work = work_of_lane(first);
      const int end = before + inclusive_scan(work);
      const unsigned past = __ballot_sync(~0u, end > unit);
      if (past != 0) {
        const int holder = __ffs(static_cast<int>(past)) - 1;
        *first_unit = __shfl_sync(~0u, end - work, holder);
        return first + holder;
      }
      before = __shfl_sync(~0u, end, kWarpSize - 1);
    }
    return 0;  // not reached: unit < total_units()
  }

 private:
  __device__ int work_of_lane(int first) const {
    const int index = first + static_cast<int>(threadIdx.x % kWarpSize);
    return index < p_.batch ? Sequence<kFixed, kRows>(p_, index).work(p_, num_lanes_) : 0;
  }
  const AttentionParams& p_;
  const int num_lanes_;
};

}  // namespace llamatelemetry::decode
