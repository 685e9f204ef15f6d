// The decode kernels' configurations, what launchers, choice.h and the allocation of their
// workspace share. Torch-free.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace llamatelemetry::decode {

constexpr int kRowTile = 16;  // query rows of one mma
constexpr int kNumWarps = 4;
constexpr int kWarpKeys = 16;
constexpr int kTileKeys = kNumWarps * kWarpKeys;
constexpr int kLongestShortRun = 4;  // tiles, decode.cuh
constexpr int kMaxPartsAtOnce = 32;
constexpr int kMaxClusterBlocks = 16;      // cluster.cuh
constexpr int64_t kMaxClusterKeys = 8192;  // that the sequence's block table may hold

// What keys and values are stored in.
enum class Stored { kAsQueries, kE4M3, kInt8 };

struct Config {
  int head_dim;       // up to which it serves, and of its tiles
  int stages;         // of a warp's ring: loads under way that keep memory busy
  int blocks_per_sm;  // with stages, what fits a multiprocessor's shared memory: 227 KB, 64 on 7.5
  bool queries_in_registers;
  Stored stored = Stored::kAsQueries;
  // Rows of a segment: kRowTile, whose keys warps share out; or as many for each warp, which then
  // all read the same keys.
  int row_tile = kRowTile;
  // What the code needs. 80: products of m16n8k16, copies by cp.async. 75: products of m16n8k8, in
  // float16 alone, and copies through registers, for which a warp has one stage.
  int capability = 80;

  constexpr bool is_wide() const { return row_tile > kRowTile; }
  constexpr bool copies_by_registers() const { return capability < 80; }

  constexpr bool is_8_bit() const { return stored != Stored::kAsQueries; }
  // Keys and values of a warp; of 8 bits with a scale for each; by registers keys or values.
  constexpr int stage_bytes() const {
    if (copies_by_registers()) return kWarpKeys * head_dim * 2;
    return is_8_bit() ? 2 * kWarpKeys * (head_dim + 4) : 2 * kWarpKeys * head_dim * 2;
  }
  // Of the queries of a row tile in shared memory.
  constexpr int query_bytes() const {
    if (queries_in_registers) return 0;
    constexpr int kPadding = 8;
    return kRowTile * (is_8_bit() ? head_dim * 2 + kPadding + 4 : head_dim * 2);
  }
  // Warps whose o stand in shared memory at once. 1 on 7.5, whose 64 KB do not hold two blocks with
  // four from head_dim 128 on: there warps add theirs up in turn.
  constexpr int merge_slots() const { return copies_by_registers() ? 1 : kNumWarps; }
  // Merge of decode.cuh: o of warps, the row statistics of each, and statistics of parts.
  constexpr int merge_bytes() const {
    return merge_slots() * kRowTile * (head_dim + 4) * 4 + kNumWarps * kRowTile * 2 * 4 +
           row_tile * kMaxPartsAtOnce * 8;
  }
  constexpr int shared_bytes() const {
    constexpr int kLine = 128;  // what the struct is aligned to
    const int queries = query_bytes() == 0 ? kLine : (query_bytes() + kLine - 1) / kLine * kLine;
    return std::max(kNumWarps * stages * stage_bytes(), merge_bytes()) + queries;
  }
  // Places for parts of columns that a block of cluster.cuh adds up: those of all its blocks.
  constexpr int cluster_slots() const {
    return static_cast<int>(std::bit_ceil(static_cast<unsigned>(kRowTile * head_dim / 4)));
  }
};

constexpr Config kConfigs[] = {
    {.head_dim = 64, .stages = 4, .blocks_per_sm = 2, .queries_in_registers = true},
    {.head_dim = 96, .stages = 3, .blocks_per_sm = 2, .queries_in_registers = true},
    {.head_dim = 128, .stages = 3, .blocks_per_sm = 2, .queries_in_registers = true},
    // Fragments of the queries beside the output's would spill.
    {.head_dim = 192, .stages = 2, .blocks_per_sm = 2, .queries_in_registers = false},
    {.head_dim = 256, .stages = 2, .blocks_per_sm = 1, .queries_in_registers = false},
};

// Over keys and values of 8 bits: half the bytes a stage, so more of them.
constexpr Config kE4M3Configs[] = {
    {.head_dim = 64,
     .stages = 8,
     .blocks_per_sm = 2,
     .queries_in_registers = true,
     .stored = Stored::kE4M3},
    {.head_dim = 128,
     .stages = 5,
     .blocks_per_sm = 2,
     .queries_in_registers = true,
     .stored = Stored::kE4M3},
    {.head_dim = 192,
     .stages = 4,
     .blocks_per_sm = 2,
     .queries_in_registers = false,
     .stored = Stored::kE4M3},
    {.head_dim = 256,
     .stages = 3,
     .blocks_per_sm = 2,
     .queries_in_registers = false,
     .stored = Stored::kE4M3},
};
constexpr Config in_int8(Config config) {
  config.stored = Stored::kInt8;
  return config;
}
constexpr Config kInt8Configs[] = {in_int8(kE4M3Configs[0]), in_int8(kE4M3Configs[1]),
                                   in_int8(kE4M3Configs[2]), in_int8(kE4M3Configs[3])};

// For more rows than kRowTile.
constexpr int kWideRowTile = kNumWarps * kRowTile;
constexpr Config widened(Config config) {
  config.row_tile = kWideRowTile;
  return config;
}
constexpr Config kWideConfigs[] = {widened(kConfigs[0]), widened(kConfigs[1]),
                                   widened(kConfigs[2])};
constexpr int kMaxWideHeadDim = 128;

// For compute capability 7.5. It has run on an H200; no GPU of 7.5 has timed it. By ptxas for
// sm_75, the larger of fixed and free splits, and in the loop over 16 keys:
// clang-format off
//   head_dim  shared memory  registers  stack  instructions of the loop  its loads from the stack
//         64           9 KB        248      0                       791                         0
//         96          12 KB        255     56                       960                         0
//        128          16 KB        255    120                      1051                         0
//        192          30 KB        255    288                      1487                        52
//        256          40 KB        255    296                      1660                        69
// clang-format on
// A T4 gives each of its 40 multiprocessors 64 KB, 64 K registers and of 320 GB/s 5 bytes a clock.
// Those instructions ask for 21 to 39 bytes of keys and values a clock, the tensor cores for 64, so
// memory binds. Its latency, some 700 clocks, needs 4 KB under way: a warp has 2 to 4.
constexpr Config for_sm75(int head_dim, int blocks_per_sm, bool queries_in_registers) {
  return {.head_dim = head_dim,
          .stages = 1,
          .blocks_per_sm = blocks_per_sm,
          .queries_in_registers = queries_in_registers,
          .capability = 75};
}
constexpr Config kSm75Configs[] = {
    for_sm75(64, 2, true),   for_sm75(96, 2, true),   for_sm75(128, 2, true),
    for_sm75(192, 2, false), for_sm75(256, 1, false),
};

template <int kCount>
constexpr const Config& first_that_holds(const Config (&configs)[kCount], int64_t head_dim) {
  for (const Config& config : configs) {
    if (head_dim <= config.head_dim) return config;
  }
  return configs[kCount - 1];
}
constexpr const Config& config_of(int64_t head_dim, Stored stored, bool is_wide, bool is_sm75) {
  if (is_sm75) return first_that_holds(kSm75Configs, head_dim);
  if (is_wide) return first_that_holds(kWideConfigs, head_dim);
  if (stored == Stored::kE4M3) return first_that_holds(kE4M3Configs, head_dim);
  if (stored == Stored::kInt8) return first_that_holds(kInt8Configs, head_dim);
  return first_that_holds(kConfigs, head_dim);
}

// Blocks that a multiprocessor holds at once, of a GPU that gives one block so much shared memory.
// A KB of each block's share is the system's.
constexpr int resident_blocks(const Config& config, int max_shared_bytes) {
  constexpr int kSystemBytes = 1024;
  const int fit = (max_shared_bytes + kSystemBytes) / (config.shared_bytes() + kSystemBytes);
  return std::clamp(fit, 1, config.blocks_per_sm);
}

}  // namespace llamatelemetry::decode
