// What the launchers of quantised rows take: what is quantised, and what it is made of.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"

namespace llamatelemetry {

enum class RowSource : int8_t {
  kRow,         // x
  kRmsNorm,     // rms_norm(x, weight), with a residual that of residual += x
  kSiluAndMul,  // silu(x[:, :row_size]) * x[:, row_size:]
};

struct QuantizeRowsParams {
  const void* x;       // [num_rows, row_size], of kSiluAndMul [num_rows, 2 * row_size]
  const void* weight;  // [row_size], of kRmsNorm
  void* residual;      // [num_rows, row_size], of kRmsNorm, or null
  void* q;             // [num_rows, row_size] of `to`, contiguous
  float* scales;       // [num_rows, scales a row]
  int64_t num_rows;
  int64_t row_size;
  int64_t x_row_stride;  // elements
  int64_t residual_row_stride;
  bool in_blocks;  // a scale for each kQuantizeBlock values of a row, or for the row
  float eps;
  float weight_offset;
  RowSource source;
  DType dtype;  // of x and weight
  DType to;     // kInt8 or kFloat8E4M3
};
// Of RowSource::kRow alone.
Error launch_quantize_rows(const QuantizeRowsParams& params, Stream stream);
// CUDA: of the others, which the CPU makes first.
Error launch_quantize_made_rows(const QuantizeRowsParams& params, Stream stream);

constexpr int64_t kQuantizeBlock = 128;
static inline constexpr int64_t scales_a_row(bool in_blocks, int64_t row_size) {
  return in_blocks ? (row_size + kQuantizeBlock - 1) / kQuantizeBlock : 1;
}

// The largest value of what x is quantised to: a row's largest lands there.
static inline constexpr float largest_of(DType to) { return to == DType::kInt8 ? 127.0f : 448.0f; }

}  // namespace llamatelemetry
