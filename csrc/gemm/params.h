// What the launchers of csrc/gemm/ take.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/backend.h"
#include "common/dtype.h"
#include "format/groups.h"
#include "gemm/choice.h"

namespace llamatelemetry {

// What follows the product of linear, each step rounded to the dtype of x as modules of their own
// round it: y = x . W^T + bias, activation(y) or activation(gate) * up, residual + that.
struct LinearEpilogue {
  const void* bias;      // [n] or null
  const void* residual;  // [m, out_n], rows residual_row_stride apart, or null
  int64_t residual_row_stride;
  Activation activation;
  bool gated;  // the first half of the n columns are gates, the second half what they multiply
};

struct LinearParams {
  const void* x;       // [m, k], rows x_row_stride apart
  const void* weight;  // [n, k], rows weight_row_stride apart
  void* out;           // [m, out_n], contiguous
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t x_row_stride;
  int64_t weight_row_stride;
  LinearEpilogue epilogue;
  DType dtype;  // of all
};
Error launch_linear(const LinearParams& params, Stream stream);

struct LinearEpilogueParams {
  const void* y;  // [m, n], contiguous; the bias is in it
  void* out;      // [m, out_n], contiguous; y itself is fine where nothing is gated
  int64_t m;
  int64_t out_n;
  LinearEpilogue epilogue;
  DType dtype;
};
Error launch_linear_epilogue(const LinearEpilogueParams& params, Stream stream);

struct QuantLinearParams {
  const void* x;          // [m, k], rows x_row_stride elements apart
  const uint8_t* packed;  // [n, k] of format in tiles, format/layout.h
  const void* bias;       // [n] or null
  GroupScales groups;     // of formats with scales beside their blocks
  void* out;              // [m, n], contiguous; [m, n / 2] where gated
  void* workspace;        // quant_linear_workspace_bytes
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t x_row_stride;
  int format;   // row of kFormats
  DType dtype;  // of x, bias and out
  bool exact;
  QuantLinearImpl impl;   // not kDense
  Activation activation;  // of the result; only where applies_activation, as gated is
  bool gated;             // the first half of the n columns are gates of the second
};
Error launch_quant_linear(const QuantLinearParams& params, Stream stream);

// What a launch needs beside its output; each backend says. workspace may still be null.
int64_t quant_linear_workspace_bytes(const QuantLinearParams& params);

// CUDA: what launch_quant_linear hands kStream to, by its stream_set and the dtype of x.
Error launch_quant_stream_f16(const QuantLinearParams& params, Stream stream);
Error launch_quant_stream_bf16(const QuantLinearParams& params, Stream stream);
Error launch_quant_stream_wide_f16(const QuantLinearParams& params, Stream stream);
Error launch_quant_stream_wide_bf16(const QuantLinearParams& params, Stream stream);
Error launch_quant_stream_tables_f16(const QuantLinearParams& params, Stream stream);
Error launch_quant_stream_tables_bf16(const QuantLinearParams& params, Stream stream);

// CUDA: what launch_quant_linear hands kSkinny to, by the set of formats and the dtype of x.
Error launch_quant_skinny_f16(const QuantLinearParams& params, Stream stream);
Error launch_quant_skinny_bf16(const QuantLinearParams& params, Stream stream);
Error launch_quant_skinny_low_bit_f16(const QuantLinearParams& params, Stream stream);
Error launch_quant_skinny_low_bit_bf16(const QuantLinearParams& params, Stream stream);
Error launch_quant_skinny_groups_f16(const QuantLinearParams& params, Stream stream);
Error launch_quant_skinny_groups_bf16(const QuantLinearParams& params, Stream stream);

// What launch_quant_linear hands kFused to for the formats of FormatSet::kLowBit and kGroups.
Error launch_quant_linear_low_bit(const QuantLinearParams& params, Stream stream);
Error launch_quant_linear_groups(const QuantLinearParams& params, Stream stream);

// x[m, perm]: what a weight meets whose columns were sorted.
struct PermuteColumnsParams {
  const void* x;        // [m, k], rows x_row_stride elements apart
  const int32_t* perm;  // [k]; of a number that is no column the result is 0
  void* out;            // [m, k], contiguous
  int64_t m;
  int64_t k;
  int64_t x_row_stride;
  DType dtype;  // of x and out
};
Error launch_permute_columns(const PermuteColumnsParams& params, Stream stream);

struct DenseWeightsParams {
  const uint8_t* packed;  // [n, k] of format in tiles
  GroupScales groups;     // of formats with scales beside their blocks
  void* weights;          // [n, k], contiguous
  int64_t n;
  int64_t k;
  int format;   // row of kFormats
  DType dtype;  // of weights
};
Error launch_dense_weights(const DenseWeightsParams& params, Stream stream);

// What launch_dense_weights hands the formats of FormatSet::kLowBit and kGroups to.
Error launch_dense_weights_low_bit(const DenseWeightsParams& params, Stream stream);
Error launch_dense_weights_groups(const DenseWeightsParams& params, Stream stream);

}  // namespace llamatelemetry
