// How the keys of a decode step are divided among blocks, on the device: a replay of a CUDA graph
// may come with other lengths, its grid stays.
//
// A sequence gives (kv heads * row tiles) segments, each of `tiles` tiles of keys. The tiles of all
// segments, in order, are cut into runs that differ by at most one tile, so that a long sequence
// beside short ones does not set the time. Where a run ends inside a segment the next block goes on
// with it, and the last block of the segment combines the parts.
//                                                       (Stream-K: Osama et al. 2023, for GEMM)
#pragma once

#include "attention/decode/config.h"
#include "attention/params.h"
#include "tile/reduce.cuh"

namespace llamatelemetry::decode {

// One sequence as the plan sees it.
struct Sequence {
  int first_query;
  int num_queries;
  int64_t first_key;  // dense and packed: in k and v
  int num_keys;
  int begin, end;  // the keys that any query sees
  int tiles;       // from the one that holds begin on; at least 1, so that every row is written
  int row_tiles;   // of (query, head of the group) rows

  __device__ Sequence(const AttentionParams& p, int index) {
    const SequenceSpan span = sequence_span(p, index);
    first_query = static_cast<int>(span.first_query);
    num_queries = static_cast<int>(span.num_queries);
    first_key = span.first_key;
    num_keys = static_cast<int>(span.num_keys);
    begin = static_cast<int>(keys_of(p, 0).begin);
    end = static_cast<int>(keys_of(p, num_queries - 1).end);
    tiles = max(1, (end + kTileKeys - 1) / kTileKeys - begin / kTileKeys);
    row_tiles = (num_queries * static_cast<int>(p.group_size) + kRowTile - 1) / kRowTile;
  }
  __device__ KeyRange keys_of(const AttentionParams& p, int query) const {
    return p.k.page_size > 0
               ? paged_keys(p, num_keys, num_queries, query)
               : window_keys(p.window_left, p.window_right, num_keys, num_queries, query);
  }
  __device__ int work(const AttentionParams& p) const {
    return num_queries > 0 ? tiles * row_tiles * static_cast<int>(p.num_heads_kv) : 0;
  }
};

// Block b's run is the tiles [first_of(b), first_of(b + 1)).
struct Runs {
  int num_runs, quotient, remainder;  // the first `remainder` runs have one tile more

  __device__ Runs(int total, int num_blocks)
      : num_runs(max(1, min(num_blocks, total / kMinRunTiles))),
        quotient(total / num_runs),
        remainder(total % num_runs) {}
  __device__ int first_of(int block) const { return block * quotient + min(block, remainder); }
  __device__ int block_of(int tile) const {
    const int longer = remainder * (quotient + 1);
    return tile < longer ? tile / (quotient + 1) : remainder + (tile - longer) / quotient;
  }
};

// Looks through the sequences, a lane each; every warp does so for itself.
class Plan {
 public:
  __device__ explicit Plan(const AttentionParams& p) : p_(p) {}

  __device__ int total_tiles() const {
    int sum = 0;
    for (int first = 0; first < p_.batch; first += kWarpSize) sum += work_of_lane(first);
    return __shfl_sync(~0u, inclusive_scan(sum), kWarpSize - 1);
  }
  // The sequence that holds a tile, and the first tile of that sequence.
  __device__ int find(int tile, int* first_tile) const {
    int before = 0;
    for (int first = 0; first < p_.batch; first += kWarpSize) {
      const int work = work_of_lane(first);
      const int end = before + inclusive_scan(work);
      const unsigned past = __ballot_sync(~0u, end > tile);
      if (past != 0) {
        const int holder = __ffs(static_cast<int>(past)) - 1;
        *first_tile = __shfl_sync(~0u, end - work, holder);
        return first + holder;
      }
      before = __shfl_sync(~0u, end, kWarpSize - 1);
    }
    return 0;  // not reached: tile < total_tiles()
  }

 private:
  __device__ int work_of_lane(int first) const {
    const int index = first + static_cast<int>(threadIdx.x % kWarpSize);
    return index < p_.batch ? Sequence(p_, index).work(p_) : 0;
  }
  static __device__ int inclusive_scan(int value) {
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int left = __shfl_up_sync(~0u, value, step);
      if (threadIdx.x % kWarpSize >= step) value += left;
    }
    return value;
  }
  const AttentionParams& p_;
};

}  // namespace llamatelemetry::decode
