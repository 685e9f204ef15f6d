// What the launchers of csrc/norm/ take. Strides in elements; every row is contiguous.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"

namespace llamatelemetry {

struct RmsNormParams {
  const void* x;       // [num_tokens, hidden_size], rows x_row_stride apart
  const void* weight;  // [hidden_size]
  void* out;           // [num_tokens, hidden_size], contiguous
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t x_row_stride;
  float eps;
  DType dtype;
};
Error launch_rms_norm(const RmsNormParams& params, Stream stream);

}  // namespace llamatelemetry
