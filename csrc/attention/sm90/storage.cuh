// What the scheduling warp, the copying warp and the computing warpgroups of the Hopper kernel
// share: the shape of a tile, the buffers in shared memory and the description of the work.
#pragma once

#include <cuda.h>

#include <climits>
#include <cstdint>

#include "attention/schedule.cuh"
#include "attention/sm90/key_blocks.cuh"
#include "attention/sm90/params.h"
#include "attention/sm90/tiles.h"

namespace llamatelemetry {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupRows = Sm90TileConfig::kWarpgroupRows;
constexpr int kWarpRows = 16;     // and of each of its warps
constexpr int kColumnBlock = 64;  // columns of a swizzled row of 128 bytes
constexpr int kColumnBlockBytes = 128;
constexpr int kDepth = 16;  // of one wgmma

// A row of tiles.h as what follows from it.
template <Sm90TileConfig kConfig>
struct Sm90Tile {
  static_assert(kConfig.warpgroups >= 2 && kConfig.warpgroups <= 4);  // kComputeRegisters
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kColumnBlocks = (kHeadDim + kColumnBlock - 1) / kColumnBlock;
  static constexpr int kConsumers = kConfig.warpgroups;
  static constexpr int kBlockM = kConfig.block_rows();
  static constexpr int kBlockN = kConfig.block_keys;
  // Whether this tile supports paged K/V; four warpgroups leave no registers for page lookups.
  static constexpr bool kServesPages = sm90::kMaxPagedBlockKeys % kBlockN == 0 && kConsumers < 4;
  static constexpr int kStages = kConfig.kv_stages;
  static constexpr int kQueryStages = kConfig.query_stages;
  static constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
  // 65536 registers: what the copying warpgroup does not need goes to the others.
  static constexpr int kCopyRegisters = kConsumers == 3 ? 32 : kConsumers == 2 ? 40 : 24;
  static constexpr int kComputeRegisters = kConsumers == 3 ? 160 : kConsumers == 2 ? 232 : 112;
  static constexpr int kQueryBytes = kBlockM * kColumnBlocks * kColumnBlockBytes;
  static constexpr int kKeyBytes = kBlockN * kColumnBlocks * kColumnBlockBytes;
  // Results leave by way of their own queries' buffer where there is another for the next queries.
  // Else each warp has a buffer for one or, where they fit, two column blocks at once.
  static constexpr bool kStoresInQueries = kQueryStages > 1;
  static constexpr int kStoreBlockBytes = kConsumers * kGroupRows * kColumnBlockBytes;
  static constexpr int kRingBytes = kQueryStages * kQueryBytes + 2 * kStages * kKeyBytes;
  static constexpr int kMaxBytes = 225 * 1024;  // of 227 KiB: the rest is for work and barriers
  static constexpr int kStoreBlocks =
      kStoresInQueries                                                           ? kColumnBlocks
      : kColumnBlocks % 2 == 0 && kRingBytes + 2 * kStoreBlockBytes <= kMaxBytes ? 2
                                                                                 : 1;
  static constexpr int kStoreBytes = kStoresInQueries ? 0 : kStoreBlocks * kStoreBlockBytes;
};

// A tile, as it is published: which queries and keys, and where they lie in the tensor maps.
template <typename Tile>
struct TileWork {
  KeyBlocks blocks;                          // that any of the tile's rows needs
  KeyBlocks group_blocks[Tile::kConsumers];  // that a warpgroup's rows need
  Window window;
  int first_row;  // negative: the first groups have no rows; kNoRow: there is no more work
  int num_queries;
  int head;         // of q
  int sequence;     // its index
  int batch;        // in the tensor maps
  int first_query;  // the token of row 0 of the sequence there
  int first_key;
  int part;        // of the tile's keys
  int first_seen;  // pages: the first key that any query of the sequence sees; dense: 0
  float sink;      // in log2 units; -inf: none
  float slope;     // 0: none
};
constexpr int kNoRow = INT_MIN;
constexpr int kWorkSlots = 2;  // a tile keeps its slot until its results are stored

template <typename Tile>
struct alignas(1024) Sm90Storage {
  // Each: kColumnBlocks parts of [rows][64], swizzled.
  uint8_t q[Tile::kQueryStages][Tile::kQueryBytes];
  uint8_t k[Tile::kStages][Tile::kKeyBytes];
  uint8_t v[Tile::kStages][Tile::kKeyBytes];
  // What warps store, swizzled likewise, where that is not q: kStoreBlocks parts of [rows][64].
  uint8_t out[Tile::kStoreBytes > 0 ? Tile::kStoreBytes : 1];
  TileWork<Tile> work[kWorkSlots];
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

struct Sm90Args {
  CUtensorMap q_map;  // [head_dim, tokens, heads, batch]
  CUtensorMap k_map;
  CUtensorMap v_map;
  CUtensorMap out_map;
  Sm90Params p;
  TileSchedule<int> schedule;
  int num_parts;     // of a tile's keys, each a tile of its own
  float* lse;        // of all parts, where there is more than one
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
