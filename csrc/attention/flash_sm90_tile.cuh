// What the dealing warp, the copying warp and the computing warpgroups of the Hopper kernel share:
// the shape of a tile, the buffers in shared memory and the description of the work.
#pragma once

#include <climits>
#include <cstdint>

#include "attention/flash_sm90_params.h"
#include "attention/flash_sm90_schedule.cuh"

namespace llamatelemetry {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupRows = 64;      // query rows of a warpgroup
constexpr int kWarpRows = 16;       // and of each of its warps
constexpr int kColumnBlock = 64;    // columns of a swizzled row of 128 bytes
constexpr int kColumnBlockBytes = 128;
constexpr int kDepth = 16;  // of one wgmma

template <int kWidth, int kNumConsumers, int kKeys, int kNumStages, int kNumQueryStages>
struct FlashTile {
  static_assert(kNumConsumers >= 2 && kNumConsumers <= 4);  // the registers below are for these
  static constexpr int kHeadDim = kWidth;  // columns computed; wider than head_dim where it is odd
  static constexpr int kColumnBlocks = (kWidth + kColumnBlock - 1) / kColumnBlock;
  static constexpr int kConsumers = kNumConsumers;
  static constexpr int kBlockM = kNumConsumers * kGroupRows;
  static constexpr int kBlockN = kKeys;
  // Whether it does for keys in pages. The registers of four groups leave too few to find pages.
  static constexpr bool kServesPages = kMostBlockKeys % kKeys == 0 && kNumConsumers < 4;
  static constexpr int kStages = kNumStages;
  static constexpr int kQueryStages = kNumQueryStages;
  static constexpr int kThreads = (kNumConsumers + 1) * kGroupThreads;
  // 65536 registers: what the copying warpgroup does not need goes to the others.
  static constexpr int kCopyRegisters = kNumConsumers == 3 ? 32 : kNumConsumers == 2 ? 40 : 24;
  static constexpr int kComputeRegisters = kNumConsumers == 3   ? 160
                                           : kNumConsumers == 2 ? 232
                                                                : 112;
  static constexpr int kQueryBytes = kBlockM * kColumnBlocks * kColumnBlockBytes;
  static constexpr int kKeyBytes = kBlockN * kColumnBlocks * kColumnBlockBytes;
  // Results leave by way of their own queries' buffer where there is another for the next queries.
  // Else each warp has a buffer for one or, where they fit, two column blocks at once.
  static constexpr bool kStoresInQueries = kQueryStages > 1;
  static constexpr int kStoreBlockBytes = kConsumers * kGroupRows * kColumnBlockBytes;
  static constexpr int kRingBytes = kQueryStages * kQueryBytes + 2 * kStages * kKeyBytes;
  static constexpr int kMostBytes = 225 * 1024;  // of 227 KiB: the rest is for work and barriers
  static constexpr int kStoreBlocks =
      kStoresInQueries                                                            ? kColumnBlocks
      : kColumnBlocks % 2 == 0 && kRingBytes + 2 * kStoreBlockBytes <= kMostBytes ? 2
                                                                                  : 1;
  static constexpr int kStoreBytes = kStoresInQueries ? 0 : kStoreBlocks * kStoreBlockBytes;
};

// A tile, as it is announced: which queries and keys, and where they lie in the tensor maps.
template <typename Tile>
struct FlashTileWork {
  KeyBlocks blocks;                          // that any of the tile's rows needs
  KeyBlocks group_blocks[Tile::kConsumers];  // that a warpgroup's rows need
  FlashWindow window;
  int first_row;  // negative: the first groups have no rows; kNoRow: there is no more work
  int num_queries;
  int head;         // of q
  int sequence;     // its index
  int batch;        // in the tensor maps
  int first_query;  // the token of row 0 of the sequence there
  int first_key;
  float sink;   // in log2 units; -inf: none
  float slope;  // 0: none
};
constexpr int kNoRow = INT_MIN;
constexpr int kWorkSlots = 2;  // a tile keeps its slot until its results are stored

template <typename Tile>
struct alignas(1024) FlashShared {
  // Each: kColumnBlocks parts of [rows][64], swizzled.
  uint8_t q[Tile::kQueryStages][Tile::kQueryBytes];
  uint8_t k[Tile::kStages][Tile::kKeyBytes];
  uint8_t v[Tile::kStages][Tile::kKeyBytes];
  // What warps store, swizzled likewise, where that is not q: kStoreBlocks parts of [rows][64].
  uint8_t out[Tile::kStoreBytes > 0 ? Tile::kStoreBytes : 1];
  FlashTileWork<Tile> work[kWorkSlots];
  uint64_t work_full[kWorkSlots];
  uint64_t work_empty[kWorkSlots];
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
  CUtensorMap out_map;
  FlashSm90Params p;
  FlashSchedule schedule;
  int keys_at_once;  // that one copy moves: a block of them, or the page that is a part of one
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

}  // namespace llamatelemetry
