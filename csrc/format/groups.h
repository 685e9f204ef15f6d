// Scales and zero points that are tensors of their own: 16 values of each group of a tile side by
// side, [ceil(n / 16), groups, 16], as the packed words of 16 rows are. Torch-free.
#pragma once

#include <cstdint>

#include "format/layout.h"

namespace llamatelemetry {

// Of one group of a tile.
struct TileScales {
  const float* scales;   // [16]
  const uint8_t* zeros;  // [16] or null
};

struct GroupScales {
  const float* scales;
  const uint8_t* zeros;  // or null
  int64_t groups;        // of a row
  int shift;             // log2 of the blocks of 32 weights in a group; 31: all of a row
};

constexpr int kScaleBytes = 4 * kTileRows;  // of a group of a tile
constexpr int kZeroBytes = kTileRows;

static constexpr TileScales scales_of(const GroupScales& groups, int64_t tile, int64_t block) {
  const int64_t index = tile * groups.groups + (block >> groups.shift);
  return {groups.scales + index * kTileRows,
          groups.zeros == nullptr ? nullptr : groups.zeros + index * kTileRows};
}

}  // namespace llamatelemetry
