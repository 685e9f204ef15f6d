// The order of the tiles of queries: groups of heads whose keys and values share L2, one group
// after the other; in a group the tiles of the most work first, and the heads side by side.
#pragma once

#include "attention/params.h"

namespace llamatelemetry {

// Index: what the kernel counts its tiles in, unsigned (2^32) or int (2^30 is enough: cheaper
// comparisons).
template <typename Index>
struct TileSchedule {
  Index num_tiles;
  Index num_row_blocks;  // tiles of a head
  Index num_heads;       // of the batch
  Index group_heads;     // heads whose keys and values share L2
  bool ascends;          // the first rows of a head first; else the last, which see the most keys
};

struct TilePlace {
  int row_block;
  int head;      // of q
  int sequence;  // its index
};

template <typename Index>
__device__ inline TilePlace place_of_tile(const TileSchedule<Index>& s, Index tile,
                                          Index num_heads_q) {
  const Index group = tile / (s.group_heads * s.num_row_blocks);
  const Index first_head = group * s.group_heads;
  const Index in_group = tile - first_head * s.num_row_blocks;
  const Index heads = min(s.group_heads, s.num_heads - first_head);
  const Index row = in_group / heads;
  const Index head = first_head + in_group - row * heads;
  return {static_cast<int>(s.ascends ? row : s.num_row_blocks - 1 - row),
          static_cast<int>(head % num_heads_q), static_cast<int>(head / num_heads_q)};
}

}  // namespace llamatelemetry
