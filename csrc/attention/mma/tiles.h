// The tile configurations of the kernels on mma.sync (compute capability 7.5 and 8.0), and what the
// choice must know of them. Torch-free and free of CUDA: choice.h reads it too. What each was
// measured to give: benchmarks/notes/attention.md.
#pragma once

#include <cstdint>

namespace llamatelemetry {

struct MmaTileConfig {
  int head_dim;     // columns that are computed; the heads' may be fewer
  int warps;        // of a block
  int row_tiles;    // of 16 query rows, a warp
  int block_keys;   // keys of a tile in shared memory
  int scored_keys;  // whose scores are in registers at a time
  int query_steps;  // of 16 columns each: the part of the queries that stays in registers
  int blocks;       // on a multiprocessor
  bool paged = false;

  constexpr int block_rows() const { return warps * row_tiles * 16; }
};

namespace sm75 {

// Two blocks of 4 warps share a multiprocessor: one's softmax hides under the other's products. The
// registers of 255 a thread and 32 KB a block allow no more rows or keys; nothing spills.
constexpr MmaTileConfig kHd64{.head_dim = 64,
                              .warps = 4,
                              .row_tiles = 2,
                              .block_keys = 64,
                              .scored_keys = 64,
                              .query_steps = 4,
                              .blocks = 2};
constexpr MmaTileConfig kHd96{.head_dim = 96,
                              .warps = 4,
                              .row_tiles = 1,
                              .block_keys = 64,
                              .scored_keys = 64,
                              .query_steps = 6,
                              .blocks = 2};
constexpr MmaTileConfig kHd128{.head_dim = 128,
                               .warps = 4,
                               .row_tiles = 1,
                               .block_keys = 64,
                               .scored_keys = 64,
                               .query_steps = 8,
                               .blocks = 2};
constexpr MmaTileConfig kHd256{.head_dim = 256,
                               .warps = 4,
                               .row_tiles = 1,
                               .block_keys = 16,
                               .scored_keys = 16,
                               .query_steps = 16,
                               .blocks = 2};

static inline constexpr const MmaTileConfig& tile_of(int64_t head_dim) {
  if (head_dim <= 64) return kHd64;
  if (head_dim <= 96) return kHd96;
  return head_dim <= 128 ? kHd128 : kHd256;
}

}  // namespace sm75

namespace sm80 {

// 4 warps of 32 rows and 2 blocks on a multiprocessor where accumulators fit: a block's copies and
// softmax hide under the other's products. Large tiles have fewer barriers and copies a key; they
// run where `blocks` of them fit a multiprocessor's shared memory.
constexpr MmaTileConfig kHd64{.head_dim = 64,
                              .warps = 4,
                              .row_tiles = 2,
                              .block_keys = 128,
                              .scored_keys = 64,
                              .query_steps = 4,
                              .blocks = 2};
constexpr MmaTileConfig kHd64Small{.head_dim = 64,
                                   .warps = 4,
                                   .row_tiles = 2,
                                   .block_keys = 64,
                                   .scored_keys = 64,
                                   .query_steps = 4,
                                   .blocks = 2};
constexpr MmaTileConfig kHd96{.head_dim = 96,
                              .warps = 4,
                              .row_tiles = 2,
                              .block_keys = 64,
                              .scored_keys = 64,
                              .query_steps = 0,
                              .blocks = 2};
// The scores of all 64 keys at a time would spill.
constexpr MmaTileConfig kHd128{.head_dim = 128,
                               .warps = 4,
                               .row_tiles = 2,
                               .block_keys = 64,
                               .scored_keys = 32,
                               .query_steps = 0,
                               .blocks = 2};
constexpr MmaTileConfig kHd128Small{.head_dim = 128,
                                    .warps = 4,
                                    .row_tiles = 2,
                                    .block_keys = 32,
                                    .scored_keys = 32,
                                    .query_steps = 0,
                                    .blocks = 2};
// Accumulators of 32 rows do not fit a warp's registers: 16 rows a warp, and 8 warps a block, so
// that as many rows share a tile of keys.
constexpr MmaTileConfig kHd256{.head_dim = 256,
                               .warps = 8,
                               .row_tiles = 1,
                               .block_keys = 64,
                               .scored_keys = 64,
                               .query_steps = 0,
                               .blocks = 1};
constexpr MmaTileConfig kHd256Small{.head_dim = 256,
                                    .warps = 4,
                                    .row_tiles = 1,
                                    .block_keys = 32,
                                    .scored_keys = 32,
                                    .query_steps = 0,
                                    .blocks = 2};
// Pages: tiles that leave the registers over that looking pages up takes.
constexpr MmaTileConfig kHd64Paged{.head_dim = 64,
                                   .warps = 4,
                                   .row_tiles = 2,
                                   .block_keys = 64,
                                   .scored_keys = 32,
                                   .query_steps = 0,
                                   .blocks = 2,
                                   .paged = true};
constexpr MmaTileConfig kHd128Paged{.head_dim = 128,
                                    .warps = 4,
                                    .row_tiles = 2,
                                    .block_keys = 32,
                                    .scored_keys = 32,
                                    .query_steps = 0,
                                    .blocks = 2,
                                    .paged = true};
constexpr MmaTileConfig kHd256Paged{.head_dim = 256,
                                    .warps = 4,
                                    .row_tiles = 1,
                                    .block_keys = 32,
                                    .scored_keys = 32,
                                    .query_steps = 0,
                                    .blocks = 2,
                                    .paged = true};

// Of a block: the queries, and two stages of keys and values, in 16 bits.
static inline constexpr int shared_bytes(const MmaTileConfig& tile) {
  return (tile.block_rows() + 2 * 2 * tile.block_keys) * tile.head_dim * 2;
}

static inline constexpr const MmaTileConfig& paged_tile_of(int64_t head_dim) {
  if (head_dim <= 64) return kHd64Paged;
  return head_dim <= 128 ? kHd128Paged : kHd256Paged;
}
// Whether large tiles fit; kHd96 has no smaller sibling.
static inline constexpr bool has_room(int64_t head_dim, int max_shared_bytes) {
  const auto fits = [&](const MmaTileConfig& tile) {
    return max_shared_bytes >= tile.blocks * shared_bytes(tile);
  };
  if (head_dim <= 64) return fits(kHd64);
  if (head_dim <= 96) return true;
  return head_dim <= 128 ? fits(kHd128) : fits(kHd256);
}
static inline constexpr const MmaTileConfig& tile_of(int64_t head_dim, bool large) {
  if (head_dim <= 64) return large ? kHd64 : kHd64Small;
  if (head_dim <= 96) return kHd96;
  if (head_dim <= 128) return large ? kHd128 : kHd128Small;
  return large ? kHd256 : kHd256Small;
}

}  // namespace sm80
}  // namespace llamatelemetry
