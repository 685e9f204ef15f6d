// What the launchers of csrc/cache/ take. Nothing is computed here, so elements are bytes.
#pragma once

#include <cstdint>

#include "common/backend.h"

namespace llamatelemetry {

// K or V: where its rows (a token's heads) come from and the pages they go to. Within a page's row
// the heads are contiguous.
struct CachePlane {
  const void* source;  // [num_tokens, num_heads, head_dim]; unused by copy_blocks_
  int64_t token_stride_bytes;
  int64_t head_stride_bytes;
  void* cache;  // [num_blocks, page_size, num_heads, head_dim]
  int64_t block_stride_bytes;
  int64_t slot_stride_bytes;
};

struct AppendKvParams {
  CachePlane planes[2];         // K, V
  const int64_t* slot_mapping;  // [num_tokens], block * page_size + offset; others are skipped
  int64_t num_tokens;
  int64_t num_blocks;
  int64_t page_size;
  int64_t num_heads;
  int64_t head_bytes;
  int copy_bytes;  // divides head_bytes, every stride and every address
};
Error launch_append_kv(const AppendKvParams& params, Stream stream);

struct CopyBlocksParams {
  CachePlane planes[2];        // K, V
  const int64_t* block_pairs;  // [num_pairs, 2], source and destination; others are skipped
  int64_t num_pairs;
  int64_t num_blocks;
  int64_t page_size;
  int64_t row_bytes;
  int copy_bytes;  // divides row_bytes, every stride and every address
};
Error launch_copy_blocks(const CopyBlocksParams& params, Stream stream);

}  // namespace llamatelemetry
