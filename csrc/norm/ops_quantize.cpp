// Rows quantised to a byte a value, as they are or as a norm or a gate makes them: checks,
// allocation and Params, compiled once for each library.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding/checks.h"
#include "binding/launch.h"
#include "norm/params.h"
#include "norm/quantize_params.h"
#include "norm/residual_checks.h"

namespace llamatelemetry {
namespace {

using Quantised = std::tuple<Tensor, Tensor>;

DType check_to(const char* op, ScalarType to) {
  check(to == ScalarType::Char || to == ScalarType::Float8_e4m3fn, op, "dtype",
        "be int8 or float8_e4m3fn", dtype_text(to));
  return *dtype_of(to);
}

// Allocates what the rows become and launches. make: the rows themselves, where the CPU, which has
// no kernel that makes and quantises them at once, makes them first.
template <typename Make>
Quantised quantised(const char* op, const Tensor& x, const Rows& rows, ScalarType to,
                    QuantizeRowsParams params, Make make) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = params.row_size;
  Tensor q = allocate(x, sizes, to);
  sizes.back() = scales_a_row(params.in_blocks, params.row_size);
  Tensor scales = allocate(x, sizes, ScalarType::Float);
  params.num_rows = rows.num_rows;
  params.x_row_stride = rows.row_stride;
  params.q = q.mutable_data_ptr();
  params.scales = static_cast<float*>(scales.mutable_data_ptr());
  if (rows.num_rows == 0) return {q, scales};
  std::optional<Tensor> made;
  if (params.source != RowSource::kRow && params.row_size > 0) {
    if constexpr (kOnCuda) {
      launch(op, launch_quantize_made_rows, params, x);
      return {q, scales};
    } else {
      std::vector<int64_t> made_sizes{rows.num_rows, params.row_size};
      made = allocate(x, made_sizes);
      make(*made);
      params.x = made->const_data_ptr();
      params.x_row_stride = params.row_size;
    }
  }
  launch(op, launch_quantize_rows, params, x);
  return {q, scales};
}

// block: how many values share a scale, kQuantizeBlock or, without one, all of a row.
QuantizeRowsParams params_of(const char* op, const Tensor& x, DType dtype, DType to,
                             RowSource source, int64_t row_size, std::optional<int64_t> block) {
  check(!block || *block == kQuantizeBlock, op, "block",
        "be None or " + std::to_string(kQuantizeBlock), std::to_string(block.value_or(0)));
  return {.x = x.const_data_ptr(),
          .weight = nullptr,
          .residual = nullptr,
          .q = nullptr,
          .scales = nullptr,
          .num_rows = 0,
          .row_size = row_size,
          .x_row_stride = 0,
          .residual_row_stride = 0,
          .in_blocks = block.has_value(),
          .eps = 0.0f,
          .weight_offset = 0.0f,
          .source = source,
          .dtype = dtype,
          .to = to};
}

Quantised quantize_rows(const Tensor& x, ScalarType to, std::optional<int64_t> block) {
  constexpr const char* op = "quantize_rows";
  const DType dtype = check_floating(op, "x", x), target = check_to(op, to);
  const Rows rows = rows_of(op, "x", x);
  const DeviceGuard guard(x);
  const QuantizeRowsParams params =
      params_of(op, x, dtype, target, RowSource::kRow, rows.row_size, block);
  return quantised(op, x, rows, to, params, [](Tensor&) {});
}

// residual: what x is added to first, in place, or none.
Quantised normed(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight,
                 ScalarType to, double eps, double weight_offset, std::optional<int64_t> block) {
  const DType dtype = check_floating(op, "x", x), target = check_to(op, to);
  const Rows rows = rows_of(op, "x", x);
  const void* weight_data =
      checked_vector(op, "weight", weight, "[hidden_size]", rows.row_size, "x", x);
  QuantizeRowsParams params =
      params_of(op, x, dtype, target, RowSource::kRmsNorm, rows.row_size, block);
  if (residual) {
    params.residual_row_stride = check_residual(op, *residual, x, rows).row_stride;
    params.residual = const_cast<void*>(residual->const_data_ptr());
  }
  const DeviceGuard guard(x);
  params.weight = weight_data;
  params.eps = static_cast<float>(eps);
  params.weight_offset = static_cast<float>(weight_offset);
  return quantised(op, x, rows, to, params, [&](Tensor& made) {
    launch(op, launch_rms_norm,
           RmsNormParams{.x = params.x,
                         .residual = params.residual,
                         .weight = params.weight,
                         .out = made.mutable_data_ptr(),
                         .num_tokens = rows.num_rows,
                         .hidden_size = rows.row_size,
                         .x_row_stride = rows.row_stride,
                         .residual_row_stride = params.residual_row_stride,
                         .out_row_stride = rows.row_size,
                         .eps = params.eps,
                         .weight_offset = params.weight_offset,
                         .dtype = dtype},
           x);
  });
}

Quantised rms_norm_quantize(const Tensor& x, const Tensor& weight, ScalarType to, double eps,
                            double weight_offset, std::optional<int64_t> block) {
  return normed("rms_norm_quantize", x, nullptr, weight, to, eps, weight_offset, block);
}

Quantised fused_add_rms_norm_quantize_(const Tensor& x, Tensor residual, const Tensor& weight,
                                       ScalarType to, double eps, double weight_offset,
                                       std::optional<int64_t> block) {
  return normed("fused_add_rms_norm_quantize_", x, &residual, weight, to, eps, weight_offset,
                block);
}

Quantised silu_and_mul_quantize(const Tensor& x, ScalarType to, std::optional<int64_t> block) {
  constexpr const char* op = "silu_and_mul_quantize";
  const DType dtype = check_floating(op, "x", x), target = check_to(op, to);
  const Rows rows = rows_of(op, "x", x);
  check(rows.row_size % 2 == 0, op, "x", "have an even last dimension (gate, then up)",
        std::to_string(rows.row_size));
  const DeviceGuard guard(x);
  const QuantizeRowsParams params =
      params_of(op, x, dtype, target, RowSource::kSiluAndMul, rows.row_size / 2, block);
  return quantised(op, x, rows, to, params, [&](Tensor& made) {
    launch(op, launch_gated_activation,
           GatedActivationParams{.x = params.x,
                                 .out = made.mutable_data_ptr(),
                                 .num_rows = rows.num_rows,
                                 .row_size = params.row_size,
                                 .x_row_stride = rows.row_stride,
                                 .activation = Activation::kSilu,
                                 .dtype = dtype},
           x);
  });
}

}  // namespace

LT_IMPL(m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize));
  m.impl("fused_add_rms_norm_quantize_", TORCH_BOX(&fused_add_rms_norm_quantize_));
  m.impl("silu_and_mul_quantize", TORCH_BOX(&silu_and_mul_quantize));
}

}  // namespace llamatelemetry
