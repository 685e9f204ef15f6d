// Which blocks of keys a tile of queries needs, and which of them are seen in full.
#pragma once

#include <climits>
#include <cstdint>

#include "attention/sm90/params.h"

namespace llamatelemetry {

// The blocks of kBlockN keys that rows [first, last] of a sequence need: [lo, hi). Those in
// [left_full, right_full) are seen in full by each of them.
struct KeyBlocks {
  int lo;
  int hi;
  int left_full;
  int right_full;
};

// Blocks [lo, hi).
struct BlockRange {
  int lo;
  int hi;
};

// Where part `part` of num_parts equal ones of the blocks lies; of a single one: everywhere.
__device__ inline BlockRange range_of_part(const KeyBlocks& blocks, int part, int num_parts) {
  if (num_parts == 1) return {0, INT_MAX};
  const int size = (blocks.hi - blocks.lo + num_parts - 1) / num_parts;
  const int lo = blocks.lo + part * size;
  return {lo, lo + size};
}

// Those of the blocks in the range.
__device__ inline KeyBlocks within(const KeyBlocks& blocks, const BlockRange& range) {
  const KeyBlocks part{max(blocks.lo, range.lo), min(blocks.hi, range.hi), blocks.left_full,
                       blocks.right_full};
  return part.hi > part.lo ? part : KeyBlocks{0, 0, 0, 0};
}

// As window_keys, in 32 bits: lengths of one sequence fit.
struct Window {
  int left;   // -1: unlimited
  int right;  // -1: unlimited
  int num_keys;
  int offset;  // position of query 0 among the keys
};
template <MaskKind kMask>
__device__ inline int window_end(const Window& w, int query) {
  if constexpr (kMask == MaskKind::kFull) return w.num_keys;
  if (kMask == MaskKind::kLocal && w.right < 0) return w.num_keys;
  return max(0, min(w.num_keys, w.offset + query + w.right + 1));
}
template <MaskKind kMask>
__device__ inline int window_begin(const Window& w, int query) {
  if constexpr (kMask != MaskKind::kLocal) return 0;
  return w.left < 0 ? 0 : max(0, w.offset + query - w.left);
}

template <MaskKind kMask, int kBlockN>
__device__ inline KeyBlocks key_blocks(const Window& w, int first, int last) {
  const int begin = window_begin<kMask>(w, first);
  const int end = window_end<kMask>(w, last);
  if (last < first || end <= begin) return {0, 0, 0, 0};
  return {begin / kBlockN, (end + kBlockN - 1) / kBlockN,
          (window_begin<kMask>(w, last) + kBlockN - 1) / kBlockN,
          window_end<kMask>(w, first) / kBlockN};
}

}  // namespace llamatelemetry
