// Which blocks of keys a tile of queries needs, and which of them are seen in full.
#pragma once

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
