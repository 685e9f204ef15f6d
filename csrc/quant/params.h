// What the launchers of csrc/quant/ take.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"

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

}  // namespace llamatelemetry
