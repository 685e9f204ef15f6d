// The decode kernels' configurations, what launchers, choice.h and the allocation of their
// workspace share. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llamatelemetry::decode {

constexpr int kRowTile = 16;  // query rows of one mma
constexpr int kNumWarps = 4;
constexpr int kWarpKeys = 16;
constexpr int kTileKeys = kNumWarps * kWarpKeys;
// A run is at least this many tiles long, unless there are fewer: more parts take longer to combine
// than 128 keys to read.
constexpr int kMinRunTiles = 2;
constexpr int kMaxPartsAtOnce = 32;

struct Config {
  int head_dim;       // up to which it serves, and of its tiles
  int stages;         // of a warp's ring: two loads under way keep memory busy
  int blocks_per_sm;  // with stages, what fits 227 KB of shared memory
  bool queries_in_registers;

  constexpr int stage_bytes() const { return 2 * kWarpKeys * head_dim * 2; }
  // Merge of decode.cuh: o of each warp, their row statistics, and statistics of parts.
  constexpr int merge_bytes() const {
    return kNumWarps * kRowTile * (head_dim + 4 + 2) * 4 + kRowTile * kMaxPartsAtOnce * 8;
  }
  constexpr int shared_bytes() const {
    constexpr int kLine = 128;  // what the struct is aligned to
    const int queries = queries_in_registers ? kLine : kRowTile * head_dim * 2;
    return std::max(kNumWarps * stages * stage_bytes(), merge_bytes()) + queries;
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

constexpr const Config& config_of(int64_t head_dim) {
  for (const Config& config : kConfigs) {
    if (head_dim <= config.head_dim) return config;
  }
  return kConfigs[4];
}

// Blocks that a multiprocessor holds at once, of a GPU that gives one block so much shared memory.
// A KB of each block's share is the system's.
constexpr int resident_blocks(const Config& config, int max_shared_bytes) {
  constexpr int kSystemBytes = 1024;
  const int fit = (max_shared_bytes + kSystemBytes) / (config.shared_bytes() + kSystemBytes);
  return std::clamp(fit, 1, config.blocks_per_sm);
}

}  // namespace llamatelemetry::decode
