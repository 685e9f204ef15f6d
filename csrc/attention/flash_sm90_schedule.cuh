// Which tile of queries a block of the Hopper kernel works on next, and which keys it reads.
#pragma once

#include <cstdint>

#include "attention/flash_sm90_params.h"

namespace llamatelemetry {

// The order of the tiles: sections of heads whose keys and values share L2; in a section the tiles
// of the most work first, and the heads side by side.
struct FlashSchedule {
  int num_tiles;
  int num_row_blocks;  // tiles of a head
  int num_heads;       // of the batch
  int section_heads;
  bool ascends;  // the first rows of a head first; else the last, which see the most keys
};

struct FlashTilePlace {
  int row_block;
  int head;   // of q
  int index;  // of the sequence
};

__device__ inline FlashTilePlace place_of_tile(const FlashSchedule& s, int tile, int num_heads_q) {
  const int section = tile / (s.section_heads * s.num_row_blocks);
  const int first_head = section * s.section_heads;
  const int in_section = tile - first_head * s.num_row_blocks;
  const int heads = min(s.section_heads, s.num_heads - first_head);
  const int row = in_section / heads;
  const int head = first_head + in_section - row * heads;
  return {s.ascends ? row : s.num_row_blocks - 1 - row, head % num_heads_q, head / num_heads_q};
}

// The blocks of kBlockN keys that rows [first, last] of a sequence need: [lo, hi). Those in
// [left_full, right_full) are seen in full by each of them.
struct KeyBlocks {
  int lo;
  int hi;
  int left_full;
  int right_full;
};

// As window_keys, in 32 bits: lengths of one sequence fit.
struct FlashWindow {
  int left;   // -1: unlimited
  int right;  // -1: unlimited
  int num_keys;
  int offset;  // position of query 0 among the keys
};
template <FlashMask kMask>
__device__ inline int window_end(const FlashWindow& w, int query) {
  if constexpr (kMask == FlashMask::kFull) return w.num_keys;
  if (kMask == FlashMask::kLocal && w.right < 0) return w.num_keys;
  return max(0, min(w.num_keys, w.offset + query + w.right + 1));
}
template <FlashMask kMask>
__device__ inline int window_begin(const FlashWindow& w, int query) {
  if constexpr (kMask != FlashMask::kLocal) return 0;
  return w.left < 0 ? 0 : max(0, w.offset + query - w.left);
}

template <FlashMask kMask, int kBlockN>
__device__ inline KeyBlocks key_blocks(const FlashWindow& w, int first, int last) {
  const int begin = window_begin<kMask>(w, first);
  const int end = window_end<kMask>(w, last);
  if (last < first || end <= begin) return {0, 0, 0, 0};
  return {begin / kBlockN, (end + kBlockN - 1) / kBlockN,
          (window_begin<kMask>(w, last) + kBlockN - 1) / kBlockN,
          window_end<kMask>(w, first) / kBlockN};
}

}  // namespace llamatelemetry
