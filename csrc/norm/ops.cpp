// Row ops: checks, allocation and Params, compiled once for each library.
#include <optional>
#include <string>

#include "binding/checks.h"
#include "binding/launch.h"
#include "norm/params.h"
#include "norm/residual_checks.h"

namespace llamatelemetry {
namespace {

// A vector over the last dimension of x, or nullptr where an optional one is left out.
const void* checked_columns(const char* op, const char* arg, const std::optional<Tensor>& vector,
                            const Tensor& x, int64_t row_size) {
  return checked_vector(op, arg, vector, "[hidden_size]", row_size, "x", x);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset) {
  constexpr const char* op = "rms_norm";
  const DType dtype = check_floating(op, "x", x);
  const Rows rows = rows_of(op, "x", x);  // leading dimensions folded
  const void* weight_data = checked_columns(op, "weight", weight, x, rows.row_size);
  const DeviceGuard guard(x);
  Tensor out = allocate(x, x.sizes());
  if (x.numel() == 0) return out;  // an empty grid is a launch error
  const RmsNormParams params{
      .x = x.const_data_ptr(),
      .residual = nullptr,
      .weight = weight_data,
      .out = out.mutable_data_ptr(),
      .num_tokens = rows.num_rows,
      .hidden_size = rows.row_size,
      .x_row_stride = rows.row_stride,
      .residual_row_stride = 0,
      .out_row_stride = rows.row_size,
      .eps = static_cast<float>(eps),
      .weight_offset = static_cast<float>(weight_offset),
      .dtype = dtype,
  };
  launch(op, launch_rms_norm, params, x);
  return out;
}

void fused_add_rms_norm_(Tensor x, Tensor residual, const Tensor& weight, double eps,
                         double weight_offset) {
  constexpr const char* op = "fused_add_rms_norm_";
  const DType dtype = check_floating(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  check_apart(op, "x", rows.num_rows, rows.row_stride, rows.row_size);
  const Rows residual_rows = check_residual(op, residual, x, rows);
  const void* weight_data = checked_columns(op, "weight", weight, x, rows.row_size);
  const DeviceGuard guard(x);
  if (x.numel() == 0) return;
  const RmsNormParams params{
      .x = x.const_data_ptr(),
      .residual = residual.mutable_data_ptr(),
      .weight = weight_data,
      .out = x.mutable_data_ptr(),
      .num_tokens = rows.num_rows,
      .hidden_size = rows.row_size,
      .x_row_stride = rows.row_stride,
      .residual_row_stride = residual_rows.row_stride,
      .out_row_stride = rows.row_stride,
      .eps = static_cast<float>(eps),
      .weight_offset = static_cast<float>(weight_offset),
      .dtype = dtype,
  };
  launch(op, launch_rms_norm, params, x);
}

Tensor layer_norm(const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                  double eps, double weight_offset) {
  constexpr const char* op = "layer_norm";
  const DType dtype = check_floating(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  const void* weight_data = checked_columns(op, "weight", weight, x, rows.row_size);
  const void* bias_data = checked_columns(op, "bias", bias, x, rows.row_size);
  const DeviceGuard guard(x);
  Tensor out = allocate(x, x.sizes());
  if (x.numel() == 0) return out;
  const LayerNormParams params{
      .x = x.const_data_ptr(),
      .weight = weight_data,
      .bias = bias_data,
      .out = out.mutable_data_ptr(),
      .num_tokens = rows.num_rows,
      .hidden_size = rows.row_size,
      .x_row_stride = rows.row_stride,
      .eps = static_cast<float>(eps),
      .weight_offset = weight_data ? static_cast<float>(weight_offset) : 0.0f,
      .dtype = dtype,
  };
  launch(op, launch_layer_norm, params, x);
  return out;
}

RotaryHeads rotary_heads_of(const char* op, const char* arg, Tensor& x, const Tensor& q) {
  check_dim(op, arg, x, 3, "[num_tokens, num_heads, head_dim]");
  check_shape(op, arg, x, "[num_tokens, num_heads, head_dim] with q's tokens and head_dim",
              {q.size(0), x.size(1), q.size(2)});
  check_like(op, arg, x, "q", q);
  check_last_contiguous(op, arg, x);
  check_apart(op, arg, x.size(0), x.stride(0), x.size(2));
  check_apart(op, arg, x.size(1), x.stride(1), x.size(2));
  return {.x = x.mutable_data_ptr(),
          .num_heads = x.size(1),
          .token_stride = x.stride(0),
          .head_stride = x.stride(1)};
}

void rotary_embedding_(Tensor q, Tensor k, const Tensor& cos, const Tensor& sin,
                       std::optional<Tensor> positions, bool interleaved) {
  constexpr const char* op = "rotary_embedding_";
  const DType dtype = check_floating(op, "q", q);
  const RotaryHeads q_heads = rotary_heads_of(op, "q", q, q);
  const RotaryHeads k_heads = rotary_heads_of(op, "k", k, q);
  const int64_t num_tokens = q.size(0);
  const int64_t head_dim = q.size(2);
  check_dim(op, "cos", cos, 2, "[positions, rotary_dim]");
  const int64_t num_positions = cos.size(0);
  const int64_t rotary_dim = cos.size(1);
  check(rotary_dim % 2 == 0 && rotary_dim <= head_dim, op, "cos",
        "have an even rotary_dim <= head_dim = " + std::to_string(head_dim),
        std::to_string(rotary_dim));
  check_shape(op, "sin", sin, "the shape of cos", {num_positions, rotary_dim});
  check_like(op, "cos", cos, "q", q);
  check_like(op, "sin", sin, "q", q);
  check_last_contiguous(op, "cos", cos);
  check_last_contiguous(op, "sin", sin);
  if (positions) {
    const ScalarType type = positions->scalar_type();
    check(type == ScalarType::Long || type == ScalarType::Int, op, "positions", "be int64 or int32",
          dtype_text(type));
    check_shape(op, "positions", *positions, "[num_tokens]", {num_tokens});
    check_device(op, "positions", *positions, "q", q);
    check_contiguous(op, "positions", *positions);
  } else {
    check(num_positions >= num_tokens, op, "cos",
          "have a row for each of the " + std::to_string(num_tokens) + " tokens",
          std::to_string(num_positions) + " rows; or pass positions");
  }
  const DeviceGuard guard(q);
  if (num_tokens == 0 || rotary_dim == 0 || q_heads.num_heads + k_heads.num_heads == 0) return;
  const RotaryEmbeddingParams params{
      .q = q_heads,
      .k = k_heads,
      .cos = cos.const_data_ptr(),
      .sin = sin.const_data_ptr(),
      .positions = positions ? positions->const_data_ptr() : nullptr,
      .positions_are_int64 = positions && positions->scalar_type() == ScalarType::Long,
      .interleaved = interleaved,
      .dtype = dtype,
      .num_tokens = num_tokens,
      .num_positions = num_positions,
      .rotary_dim = rotary_dim,
      .cos_row_stride = cos.stride(0),
      .sin_row_stride = sin.stride(0),
  };
  launch(op, launch_rotary_embedding, params, q);
}

Tensor gated_activation(const char* op, Activation activation, const Tensor& x) {
  const DType dtype = check_floating(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  check(rows.row_size % 2 == 0, op, "x", "have an even last dimension (gate, then up)",
        std::to_string(rows.row_size));
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() /= 2;
  const DeviceGuard guard(x);
  Tensor out = allocate(x, sizes);
  if (x.numel() == 0) return out;
  const GatedActivationParams params{
      .x = x.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .num_rows = rows.num_rows,
      .row_size = rows.row_size / 2,
      .x_row_stride = rows.row_stride,
      .activation = activation,
      .dtype = dtype,
  };
  launch(op, launch_gated_activation, params, x);
  return out;
}

Tensor silu_and_mul(const Tensor& x) {
  return gated_activation("silu_and_mul", Activation::kSilu, x);
}
Tensor gelu_and_mul(const Tensor& x) {
  return gated_activation("gelu_and_mul", Activation::kGelu, x);
}
Tensor gelu_tanh_and_mul(const Tensor& x) {
  return gated_activation("gelu_tanh_and_mul", Activation::kGeluTanh, x);
}

Tensor activation(const Tensor& x, StringHandle kind_name) {
  constexpr const char* op = "activation";
  const std::string kind = take_string(kind_name);
  const DType dtype = check_floating(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  Activation activation = Activation::kNone;
  std::string names;
  for (const NamedActivation& known : kNamedActivations) {
    if (known.gated) continue;
    if (kind == known.name) activation = known.activation;
    names += (names.empty() ? "{" : ", ") + std::string(known.name);
  }
  check(activation != Activation::kNone, op, "kind", "be one of " + names + "}", kind);
  const DeviceGuard guard(x);
  Tensor out = allocate(x, x.sizes());
  if (x.numel() == 0) return out;
  const ActivationParams params{
      .x = x.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .num_rows = rows.num_rows,
      .row_size = rows.row_size,
      .x_row_stride = rows.row_stride,
      .activation = activation,
      .dtype = dtype,
  };
  launch(op, launch_activation, params, x);
  return out;
}

Tensor softmax(const Tensor& x, double temperature) {
  constexpr const char* op = "softmax";
  const DType dtype = check_floating(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  check(temperature > 0, op, "temperature", "be positive", std::to_string(temperature));
  const DeviceGuard guard(x);
  Tensor out = allocate(x, x.sizes());
  if (x.numel() == 0) return out;
  const SoftmaxParams params{
      .x = x.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .num_rows = rows.num_rows,
      .row_size = rows.row_size,
      .x_row_stride = rows.row_stride,
      .temperature = static_cast<float>(temperature),
      .dtype = dtype,
  };
  launch(op, launch_softmax, params, x);
  return out;
}

}  // namespace

LT_IMPL(m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("fused_add_rms_norm_", TORCH_BOX(&fused_add_rms_norm_));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("rotary_embedding_", TORCH_BOX(&rotary_embedding_));
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul));
  m.impl("gelu_and_mul", TORCH_BOX(&gelu_and_mul));
  m.impl("gelu_tanh_and_mul", TORCH_BOX(&gelu_tanh_and_mul));
  m.impl("activation", TORCH_BOX(&activation));
  m.impl("softmax", TORCH_BOX(&softmax));
}

}  // namespace llamatelemetry
