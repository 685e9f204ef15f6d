// What the launchers of csrc/cache/ take. Keys and values that are only copied are bytes.
#pragma once

#include <cstdint>

#include "cache/block_table.h"
#include "common/backend.h"
#include "common/cache_dtype.h"
#include "common/dtype.h"

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

// Of a cache of 8 bits: by what its numbers are multiplied. A token's and head's own, which writing
// sets to the row's largest number over the type's, or one for all (strides of 0), which is read.
struct CacheScales {
  float* data;  // nullptr: another type
  int64_t block_stride;
  int64_t slot_stride;
  int64_t head_stride;
  bool is_given;
};
constexpr float kMaxE4M3 = 448.0f;
constexpr float kMaxInt8 = 127.0f;
constexpr float kLeastRowMax = 0x1p-100f;  // of a head's row: less is stored as zeros
static inline constexpr float largest_stored(DType stored) {
  return stored == DType::kInt8 ? kMaxInt8 : kMaxE4M3;
}
static inline constexpr int64_t scale_index(const CacheScales& scales, int64_t page_size,
                                            int64_t slot, int64_t head) {
  return slot / page_size * scales.block_stride + slot % page_size * scales.slot_stride +
         head * scales.head_stride;
}

struct AppendKvParams {
  CachePlane planes[2];         // K, V
  const int64_t* slot_mapping;  // [num_tokens], block * page_size + offset; others are skipped
  int64_t num_tokens;
  int64_t num_blocks;
  int64_t page_size;
  int64_t num_heads;
  int64_t head_bytes;  // of a head in the cache
  int copy_bytes;      // divides head_bytes, every stride and every address
  CacheScales scales[2];
  DType dtype;   // of the sources
  DType stored;  // of the caches
};
// Copies; on the CPU float32 to caches of 16 bits too, rounded.
Error launch_append_kv(const AppendKvParams& params, Stream stream);
Error launch_append_8_bit(const AppendKvParams& params, Stream stream);

constexpr int kMaxRopeHeadDim = 256;  // a row of it stands in registers and in shared memory
constexpr int kMax8BitHeadDim = 256;  // likewise

struct RopeAppendKvParams {
  void* qkv;  // [num_tokens, num_heads_q + 2 * num_heads_kv, head_dim], q and k turned in place
  int64_t token_stride;
  int64_t head_stride;
  const void* cos;  // [num_positions, rotary_dim], rows cos_row_stride apart
  const void* sin;  // likewise, sin_row_stride
  int64_t cos_row_stride;
  int64_t sin_row_stride;
  const void* positions;  // [num_tokens] or nullptr: token t has position t
  bool positions_are_int64;
  bool interleaved;
  const void* q_weight;  // [head_dim], of the norm of each head; nullptr: none
  const void* k_weight;
  float eps;
  float weight_offset;          // as in RmsNormParams
  CachePlane planes[2];         // K, V; without sources
  const int64_t* slot_mapping;  // as in AppendKvParams
  int64_t num_tokens;
  int64_t num_positions;
  int64_t num_blocks;
  int64_t page_size;
  int64_t num_heads_q;
  int64_t num_heads_kv;
  int64_t head_dim;
  int64_t rotary_dim;
  CacheScales scales[2];
  DType dtype;
  DType stored;  // of the caches
};
Error launch_rope_append_kv(const RopeAppendKvParams& params, Stream stream);

// K or V of copy_blocks_ and swap_blocks_: the cache that is read and the one that is written,
// which copy_blocks_ makes the same.
struct BlockPlane {
  const void* from;  // [num_blocks_from, page_size, num_heads, head_dim]
  int64_t from_block_stride_bytes;
  int64_t from_slot_stride_bytes;
  void* to;  // [num_blocks_to, page_size, num_heads, head_dim]
  int64_t to_block_stride_bytes;
  int64_t to_slot_stride_bytes;
};

struct MoveBlocksParams {
  BlockPlane planes[2];        // K, V
  const int64_t* block_pairs;  // [num_pairs, 2], block of from and of to; others are skipped
  int64_t num_pairs;
  int64_t num_blocks_from;
  int64_t num_blocks_to;
  int64_t page_size;
  int64_t row_bytes;
  int copy_bytes;     // divides row_bytes, every stride and every address
  bool crosses_host;  // one of the caches is in host memory, and a GPU copies
};
Error launch_copy_blocks(const MoveBlocksParams& params, Stream stream);
Error launch_swap_blocks(const MoveBlocksParams& params, Stream stream);

struct SlotMappingParams {
  const int64_t* positions;     // [num_tokens]
  const int32_t* cu_seqlens_q;  // [batch + 1]; a token outside them all gets -1
  int64_t* out;                 // [num_tokens]
  int64_t num_tokens;
  BlockTable table;
};
Error launch_slot_mapping(const SlotMappingParams& params, Stream stream);

struct AdvanceStepParams {
  int64_t* input_ids;       // [batch], as all that follow
  int64_t* positions;       // of input_ids
  int64_t* slot_mapping;    // of positions
  int32_t* cache_seqlens;   // positions + 1
  int64_t* offsets;         // tokens drawn so far
  const int64_t* next_ids;  // what the step has drawn
  const bool* active;
  BlockTable table;
};
Error launch_advance_step(const AdvanceStepParams& params, Stream stream);

// One sequence's part of advance_step_. One that is not active, or has no block for its next token,
// stays where it is and writes no keys in the next step: attention reads no block that is not
// there.
static inline constexpr void advance_row(const AdvanceStepParams& p, int64_t row) {
  const int64_t position = p.positions[row] + 1;
  const int64_t slot = p.active[row] ? slot_of(p.table, row, position) : -1;
  p.slot_mapping[row] = slot;
  if (slot < 0) return;
  p.input_ids[row] = p.next_ids[row];
  p.positions[row] = position;
  p.cache_seqlens[row] += 1;
  p.offsets[row] += 1;
}

}  // namespace llamatelemetry
