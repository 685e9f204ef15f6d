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
// A part of a segment is at least this many tiles long, unless the segment is shorter: combining
// more parts takes longer than reading 256 keys.
constexpr int kMinRunTiles = 4;
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

// Each block leaves at most two parts, one at either end of its run: rows of unnormalised output
// and statistics, and a flag that says they are there.
constexpr int kPartsOfBlock = 2;
constexpr int64_t part_floats(const Config& config) {
  return int64_t{kRowTile} * (config.head_dim + 2);
}

}  // namespace llamatelemetry::decode
