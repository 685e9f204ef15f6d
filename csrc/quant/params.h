// What the launchers of csrc/quant/ take.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"
#include "format/format.h"

namespace llamatelemetry {

struct DequantizeParams {
  const uint8_t* data;  // [num_rows, blocks_per_row * block bytes], rows row_stride_bytes apart
  void* out;            // [num_rows, blocks_per_row * block weights], contiguous
  int64_t num_rows;
  int64_t blocks_per_row;
  int64_t row_stride_bytes;
  int format;  // row of kFormats
  DType dtype;
};
Error launch_dequantize(const DequantizeParams& params, Stream stream);

// CUDA: what launch_dequantize hands the formats of FormatSet::kLowBit to.
Error launch_dequantize_low_bit(const DequantizeParams& params, Stream stream);

// Rows of blocks as a file has them, [n, blocks_per_row * layout.block_bytes], row_stride_bytes
// apart; packed they are [ceil(n / 16), 16 * blocks_per_row * layout.block_bytes].
struct RepackSizes {
  int64_t n;
  int64_t blocks_per_row;
  int64_t row_stride_bytes;
  BlockLayout layout;
};

struct RepackParams {
  const uint8_t* rows;
  uint8_t* packed;
  RepackSizes sizes;
};
Error launch_repack(const RepackParams& params, Stream stream);

struct UnpackParams {
  uint8_t* rows;
  const uint8_t* packed;
  RepackSizes sizes;
};
Error launch_unpack(const UnpackParams& params, Stream stream);

struct QuantEmbeddingParams {
  const void* ids;        // [num_ids], int64 or int32, contiguous
  const uint8_t* packed;  // [n, k] of format in tiles
  void* out;              // [num_ids, k], contiguous
  int64_t num_ids;
  int64_t n;
  int64_t k;
  int format;   // row of kFormats
  DType dtype;  // of out
  bool ids_are_int64;
};
Error launch_quant_embedding(const QuantEmbeddingParams& params, Stream stream);

// CUDA: likewise.
Error launch_quant_embedding_low_bit(const QuantEmbeddingParams& params, Stream stream);

}  // namespace llamatelemetry
