// What the launchers of csrc/norm/ take. Strides in elements; every row is contiguous.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/backend.h"
#include "common/dtype.h"

namespace llamatelemetry {

// rms_norm, and with a residual fused_add_rms_norm_: then residual += x comes first, rounded to
// its dtype, and the norm is of the residual. With a weight_offset the product is taken in float,
// as by modules that store weight - 1; without, the norm is rounded before it.
struct RmsNormParams {
  const void* x;       // [num_tokens, hidden_size], rows x_row_stride apart
  void* residual;      // likewise, or nullptr
  const void* weight;  // [hidden_size]
  void* out;           // [num_tokens, hidden_size], rows out_row_stride apart; x itself is fine
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t x_row_stride;
  int64_t residual_row_stride;
  int64_t out_row_stride;
  float eps;
  float weight_offset;  // added to the weight
  DType dtype;
};
Error launch_rms_norm(const RmsNormParams& params, Stream stream);

struct LayerNormParams {
  const void* x;       // [num_tokens, hidden_size], rows x_row_stride apart
  const void* weight;  // [hidden_size] or nullptr
  const void* bias;    // [hidden_size] or nullptr
  void* out;           // [num_tokens, hidden_size], contiguous
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t x_row_stride;
  float eps;
  float weight_offset;  // added to the weight, 0 where there is none
  DType dtype;
};
Error launch_layer_norm(const LayerNormParams& params, Stream stream);

struct RotaryHeads {
  void* x;  // [num_tokens, num_heads, head_dim]
  int64_t num_heads;
  int64_t token_stride;
  int64_t head_stride;
};
struct RotaryEmbeddingParams {
  RotaryHeads q;
  RotaryHeads k;
  const void* cos;        // [num_positions, rotary_dim], rows cos_row_stride apart
  const void* sin;        // likewise, sin_row_stride
  const void* positions;  // [num_tokens] or nullptr: token t has position t
  bool positions_are_int64;
  bool interleaved;
  DType dtype;
  int64_t num_tokens;
  int64_t num_positions;
  int64_t rotary_dim;
  int64_t cos_row_stride;
  int64_t sin_row_stride;
};
Error launch_rotary_embedding(const RotaryEmbeddingParams& params, Stream stream);

struct GatedActivationParams {
  const void* x;  // [num_rows, 2 * row_size], gate then up, rows x_row_stride apart
  void* out;      // [num_rows, row_size], contiguous
  int64_t num_rows;
  int64_t row_size;
  int64_t x_row_stride;
  Activation activation;
  DType dtype;
};
Error launch_gated_activation(const GatedActivationParams& params, Stream stream);

struct ActivationParams {
  const void* x;  // [num_rows, row_size], rows x_row_stride apart
  void* out;      // [num_rows, row_size], contiguous
  int64_t num_rows;
  int64_t row_size;
  int64_t x_row_stride;
  Activation activation;
  DType dtype;
};
Error launch_activation(const ActivationParams& params, Stream stream);

struct SoftmaxParams {
  const void* x;  // [num_rows, row_size], rows x_row_stride apart
  void* out;      // [num_rows, row_size], contiguous
  int64_t num_rows;
  int64_t row_size;
  int64_t x_row_stride;
  float temperature;
  DType dtype;
};
Error launch_softmax(const SoftmaxParams& params, Stream stream);

}  // namespace llamatelemetry
