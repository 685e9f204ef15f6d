// Scales and zero points that are tensors of their own: 16 values of each group of a tile side by
// side, [ceil(n / 16), groups, 16], as the packed words of 16 rows are. Torch-free.
#pragma once

#include <cstdint>

#include "format/layout.h"

namespace llamatelemetry {

// Of one group of a tile.
struct TileScales {
  const uint8_t* scales;  // [16] float16 or bfloat16
  const uint8_t* zeros;   // [16] or null
  bool bfloat16;
};

struct GroupScales {
  const uint8_t* scales;
  const uint8_t* zeros;  // or null
  int64_t groups;        // of a row
  int shift;             // log2 of the blocks of 32 weights in a group; 31: all of a row
  bool bfloat16;
};

constexpr int kScaleBytes = 2 * kTileRows;  // of a group of a tile
constexpr int kZeroBytes = kTileRows;

static constexpr TileScales scales_of(const GroupScales& groups, int64_t tile, int64_t block) {
  const int64_t index = tile * groups.groups + (block >> groups.shift);
  return {groups.scales + index * kScaleBytes,
          groups.zeros == nullptr ? nullptr : groups.zeros + index * kZeroBytes, groups.bfloat16};
}

}  // namespace llamatelemetry
