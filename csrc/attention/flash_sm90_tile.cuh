// What the copying warp and the computing warpgroups of the Hopper kernel share: the shape of a
// tile, the buffers in shared memory and the description of the work.
#pragma once

#include <cstdint>

#include "attention/flash_sm90_params.h"
#include "attention/flash_sm90_schedule.cuh"

namespace llamatelemetry {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupRows = 64;      // query rows of a warpgroup
constexpr int kColumnBlock = 64;    // columns of a swizzled row of 128 bytes
constexpr int kColumnBlockBytes = 128;
constexpr int kDepth = 16;  // of one wgmma

template <int kWidth, int kNumConsumers, int kKeys, int kNumStages, int kNumQueryStages,
          bool kTakesTurns, bool kTilesOverlap>
struct FlashTile {
  static constexpr int kHeadDim = kWidth;  // columns computed; wider than head_dim where it is odd
  static constexpr int kColumnBlocks = (kWidth + kColumnBlock - 1) / kColumnBlock;
  static constexpr int kConsumers = kNumConsumers;
  static constexpr int kBlockM = kNumConsumers * kGroupRows;
  static constexpr int kBlockN = kKeys;
  static constexpr int kStages = kNumStages;
  static constexpr int kQueryStages = kNumQueryStages;
  static constexpr bool kTurns = kTakesTurns;
  // Whether the last product of a tile runs beside the first of the next. It takes registers.
  static constexpr bool kOverlapsTiles = kTilesOverlap;
  static constexpr int kThreads = (kNumConsumers + 1) * kGroupThreads;
  // 65536 registers: what the copying warpgroup does not need goes to the others.
  static constexpr int kCopyRegisters = kNumConsumers == 3 ? 32 : kNumConsumers == 2 ? 40 : 24;
  static constexpr int kComputeRegisters = kNumConsumers == 3   ? 160
                                           : kNumConsumers == 2 ? 232
                                                                : 112;
  static constexpr int kQueryBytes = kBlockM * kColumnBlocks * kColumnBlockBytes;
  static constexpr int kKeyBytes = kBlockN * kColumnBlocks * kColumnBlockBytes;
};

// A tile, as the copying warp announces it.
struct FlashTileWork {
  FlashTilePlace place;
  FlashSequence sequence;
  FlashWindow window;
  int first_row;  // negative: there is no more work
  int num_queries;
};
// Where a warp's 16 rows of results go: of the first one, and how many of the sequence's rows are
// left from there. In shared memory, as it waits there for a whole tile.
struct FlashWarpRows {
  void* out;
  float* lse;
  int rows_left;
  float sink;  // in log2 units
};

template <typename Tile>
struct alignas(1024) FlashShared {
  // Each: kColumnBlocks parts of [rows][64], swizzled.
  uint8_t q[Tile::kQueryStages][Tile::kQueryBytes];
  uint8_t k[Tile::kStages][Tile::kKeyBytes];
  uint8_t v[Tile::kStages][Tile::kKeyBytes];
  FlashTileWork work;  // the tile announced last
  FlashWarpRows rows[Tile::kConsumers * 4];
  uint64_t work_full;
  uint64_t work_empty;
  uint64_t work_wanted;
  uint64_t q_full[Tile::kQueryStages];
  uint64_t q_empty[Tile::kQueryStages];
  uint64_t k_full[Tile::kStages];
  uint64_t k_empty[Tile::kStages];
  uint64_t v_full[Tile::kStages];
  uint64_t v_empty[Tile::kStages];
};

struct FlashSm90Args {
  CUtensorMap q_map;  // [head_dim, tokens, heads, batch]
  CUtensorMap k_map;
  CUtensorMap v_map;
  FlashSm90Params p;
  FlashSchedule schedule;
  // 0 where a tensor has stride 0 along that dimension, so that its coordinate stays 0.
  int q_head_step, q_batch_step;
  int k_head_step, k_batch_step;
  int v_head_step, v_batch_step;
};

// A ring of kSize buffers: which one is next, and the parity of its round.
template <int kSize>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++slot == kSize) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <typename Tile>
__device__ inline FlashTileWork work_of_tile(const FlashSm90Args& a, int tile) {
  const FlashAttnParams& p = a.p.call;
  FlashTileWork work;
  work.place = place_of_tile(a.schedule, tile, static_cast<int>(p.num_heads_q));
  work.sequence = flash_sequence(p, work.place.index);
  work.num_queries = static_cast<int>(work.sequence.num_queries);
  const int num_keys = static_cast<int>(work.sequence.num_keys);
  work.window = {static_cast<int>(p.window_left), static_cast<int>(p.window_right), num_keys,
                 num_keys - work.num_queries};
  work.first_row = work.place.row_block * Tile::kBlockM;
  return work;
}
template <typename Tile, FlashMask kMask>
__device__ inline KeyBlocks blocks_of_rows(const FlashTileWork& work, int first, int num_rows) {
  return key_blocks<kMask, Tile::kBlockN>(work.window, first,
                                          min(first + num_rows, work.num_queries) - 1);
}

}  // namespace llamatelemetry
