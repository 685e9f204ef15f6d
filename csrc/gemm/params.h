// What the launchers of csrc/gemm/ take.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"

namespace llamatelemetry {

struct QuantLinearParams {
  const void* x;          // [m, k], rows x_row_stride elements apart
  const uint8_t* packed;  // [n, k] of format in tiles, format/layout.h
  const void* bias;       // [n] or null
  void* out;              // [m, n], contiguous
  void* workspace;        // quant_linear_workspace_bytes
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t x_row_stride;
  int format;   // row of kFormats
  DType dtype;  // of x, bias and out
  bool exact;
};
Error launch_quant_linear(const QuantLinearParams& params, Stream stream);

// What a launch needs beside its output; each backend says. workspace may still be null.
int64_t quant_linear_workspace_bytes(const QuantLinearParams& params);

struct DenseWeightsParams {
  const uint8_t* packed;  // [n, k] of format in tiles
  void* weights;          // [n, k], contiguous
  int64_t n;
  int64_t k;
  int format;   // row of kFormats
  DType dtype;  // of weights
};
Error launch_dense_weights(const DenseWeightsParams& params, Stream stream);

}  // namespace llamatelemetry
