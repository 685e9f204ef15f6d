// What the launchers of csrc/quant/ take.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"
#include "format/layout.h"

namespace llamatelemetry {

struct DequantizeParams {
  const uint8_t* data;  // [num_rows, blocks_per_row * block bytes], rows row_stride_bytes apart
  void* out;            // [num_rows, blocks_per_row * block weights], contiguous
  int64_t num_rows;
  int64_t blocks_per_row;
  int64_t row_stride_bytes;
  int format;
  DType dtype;
};
Error launch_dequantize(const DequantizeParams& params, Stream stream);

struct RepackParams {
  uint8_t* rows;    // GGUF, [n, blocks_per_row * layout.block_bytes], rows row_stride_bytes apart
  uint8_t* packed;  // [ceil(n / 16), 16 * blocks_per_row * layout.block_bytes]
  int64_t n;
  int64_t blocks_per_row;
  int64_t row_stride_bytes;
  QuantLayout layout;
};
Error launch_repack(const RepackParams& params, Stream stream);  // writes packed
Error launch_unpack(const RepackParams& params, Stream stream);  // writes rows

struct QuantEmbeddingParams {
  const void* ids;        // [num_ids], int64 or int32, contiguous
  const uint8_t* packed;  // [n, k] of format in tiles
  void* out;              // [num_ids, k], contiguous
  int64_t num_ids;
  int64_t n;
  int64_t k;
  int format;
  DType dtype;  // of out
  bool ids_are_int64;
};
Error launch_quant_embedding(const QuantEmbeddingParams& params, Stream stream);

}  // namespace llamatelemetry
