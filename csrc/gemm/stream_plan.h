// How the kernel of quant_stream.cuh divides a weight among blocks: a pure function of the call and
// the machine.
#pragma once

#include <cstdint>

#include "format/format.h"
#include "gemm/stream_table.h"

namespace llamatelemetry {

// One scale for a block of 32 or more, or for each 32 or 16 of a block.
static inline constexpr bool serves_stream_format(CodeFamily codes, ScaleRule rule) {
  switch (codes) {
    case CodeFamily::kU4:
      return rule == ScaleRule::kBlock || rule == ScaleRule::kGroup ||
             rule == ScaleRule::kSubBlock32;
    case CodeFamily::kU5: return rule == ScaleRule::kSubBlock32;
    case CodeFamily::kU6:
    case CodeFamily::kS8:
    case CodeFamily::kE4m3: return true;
    default: return is_stream_table(codes);
  }
}
// The kernels of each set are compiled in files of their own.
enum class StreamSet : int8_t {
  kNibbles,
  kWide,    // codes of more than four bits
  kTables,  // nibbles that name one of 16 values
};
static inline constexpr StreamSet stream_set(CodeFamily codes) {
  if (is_stream_table(codes)) return StreamSet::kTables;
  return codes == CodeFamily::kU4 ? StreamSet::kNibbles : StreamSet::kWide;
}

// Weights of a row that a warp takes at once.
static inline constexpr int stream_chunk(ScaleRule rule) {
  const bool of_256 = rule == ScaleRule::kSubBlock32 || rule == ScaleRule::kSubBlock32Six ||
                      rule == ScaleRule::kSubBlock16;
  return of_256 ? 256 : 128;
}
// Whether the kernel needs sums of x: to take from products what codes are too large by, or minima.
static inline constexpr bool has_stream_sums(CodeFamily codes, ScaleRule rule) {
  return codes == CodeFamily::kU4 || rule == ScaleRule::kSubBlock32;
}
// Of those that a chunk has, for each 32 weights or more: at most.
static inline constexpr int max_stream_sums(CodeFamily codes, ScaleRule rule) {
  return has_stream_sums(codes, rule) ? stream_chunk(rule) / 32 : 0;
}

// Of shared memory: the pair of values that each byte of two nibbles names, once for each bank, so
// that the lanes of a warp never wait for each other.
constexpr int kStreamPairBytes = 32 * 4;
static inline constexpr int stream_table_bytes(CodeFamily codes) {
  return is_stream_table(codes) ? 256 * kStreamPairBytes : 0;
}

constexpr int kMaxStreamSplits = 4;  // blocks that share k, where they can form clusters
constexpr int kMaxStreamRows = 16;
// Likewise of so many rows of x: of up to 8 more than two gain nothing.
static inline constexpr int max_stream_splits(int64_t m) { return m <= 8 ? 2 : kMaxStreamSplits; }

// How a weight is divided among blocks, which have kStreamWarps warps.
struct StreamPlan {
  int tiles;   // of a block: 16 rows of the weight each
  int splits;  // blocks of a cluster, which share k
};

constexpr int kStreamWarps = 16;

// Whether blocks may share k. Where shared memory is small, as on GeForce of Blackwell, none do.
static inline constexpr bool has_stream_clusters(int capability, int code_capability,
                                                 int max_shared_bytes) {
  return capability >= 90 && code_capability >= 90 && max_shared_bytes >= 227 * 1024;
}

// Whether the rows of x that a block has, and at most as much beside them, fit its shared memory.
static inline constexpr bool fits_stream(int64_t m, int64_t k, CodeFamily codes, ScaleRule rule,
                                         bool has_clusters, int max_shared_bytes) {
  const int64_t splits = has_clusters ? max_stream_splits(m) : 1;
  const int chunk = stream_chunk(rule);
  const int64_t chunks = (k / chunk + splits - 1) / splits;
  const int64_t rows = m == 1 ? 1 : m <= 8 ? 8 : 16;  // as they are planned for
  return k % chunk == 0 &&
         rows * (chunks * 2 * chunk + 4096) + 192 * max_stream_sums(codes, rule) * chunks <=
             max_shared_bytes - stream_table_bytes(codes);
}

// Where things lie in a block's shared memory, in bytes: the pairs of a table at 0, x behind them,
// token_bytes a row.
struct StreamShared {
  int token_bytes;
  int starts;       // of sums of x: [eights of rows][sums of a row][4] of 16 bytes
  int sums;         // of each warp: [slots][m][16] float
  int slots;        // tiles that a warp may meet
  int totals;       // splits > 1: [tiles][m][16] float
  int first_tiles;  // [kStreamWarps] int, and two of a gap, and one of each tile
  int bytes;
};
// The tiles that a warp's items may be of, if a row has so many chunks.
static inline constexpr int stream_slots(int tiles, int chunks) {
  const int items = (tiles * chunks + kStreamWarps - 1) / kStreamWarps;
  return (items + chunks - 2) / chunks + 1;
}
static inline constexpr StreamShared stream_shared(const StreamPlan& plan, int m, int chunk,
                                                   int num_chunks, int token_tiles,
                                                   int sums_of_item, int table_bytes) {
  const int chunks = (num_chunks + plan.splits - 1) / plan.splits;
  const int fewer = num_chunks / plan.splits;  // of some blocks
  StreamShared shared{};
  shared.token_bytes = chunks * chunk * 2 + 64;  // rows of x in different banks
  shared.starts = table_bytes + m * shared.token_bytes;
  shared.sums = shared.starts + token_tiles * chunks * sums_of_item * 64;
  const int slots = stream_slots(plan.tiles, chunks), of_fewer = stream_slots(plan.tiles, fewer);
  shared.slots = slots > of_fewer ? slots : of_fewer;
  shared.totals = shared.sums + kStreamWarps * shared.slots * m * 64;
  shared.first_tiles = shared.totals + (plan.splits > 1 ? plan.tiles * m * 64 : 0);
  shared.bytes = shared.first_tiles + (kStreamWarps + 2 + plan.tiles) * 4;
  return shared;
}

// slots[i]: how many clusters of i + 1 blocks run at once, a block a multiprocessor. The time of
// the last block to end, in items of one multiprocessor; tiles 0 if none fits. gated: blocks have
// even numbers of tiles.
static inline constexpr StreamPlan stream_plan(int64_t m, int64_t n, int64_t k, bool gated,
                                               int chunk, int token_tiles, int sums_of_item,
                                               int table_bytes, int max_shared_bytes,
                                               const int (&slots)[kMaxStreamSplits]) {
  // Beside its items a block costs as much as so many of 128 weights, a cluster more; so do kTokens
  // rows of x for each 128 of k.
  constexpr int64_t kBlockCost = 40, kClusterCost = 128, kTokens = 8;
  const int64_t tiles = (n + kTileRows - 1) / kTileRows, num_chunks = k / chunk;
  const int64_t together = gated ? 2 : 1;
  StreamPlan best{0, 1};
  int64_t least = 0;
  for (int splits = 1; splits <= kMaxStreamSplits && splits <= num_chunks; ++splits) {
    const int64_t at_once = slots[splits - 1];
    const int64_t chunks = (num_chunks + splits - 1) / splits;
    StreamPlan plan{0, splits};
    for (int64_t waves = 1; at_once > 0 && plan.tiles != together;
         waves += waves < 16 ? 1 : waves) {
      const int64_t places = at_once * waves * together;
      plan.tiles = static_cast<int>((tiles + places - 1) / places * together);
      const StreamShared shared =
          stream_shared(plan, static_cast<int>(m), chunk, static_cast<int>(num_chunks), token_tiles,
                        sums_of_item, table_bytes);
      if (shared.bytes > max_shared_bytes) continue;
      const int64_t of_block =
          (plan.tiles * chunks + m * chunks / kTokens) * chunk / 128 + kBlockCost;
      const int64_t cost = waves * of_block + (splits > 1 ? kClusterCost : 0);
      if (least == 0 || cost < least) best = plan, least = cost;
    }
  }
  return best;
}

}  // namespace llamatelemetry
