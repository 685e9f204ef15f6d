// Linear layers: checks, allocation and Params, compiled once for each library.
#include <optional>
#include <vector>

#include "format/checks.h"
#include "gemm/params.h"

namespace llamatelemetry {
namespace {

Tensor quant_linear(const Tensor& x, const Tensor& packed, int64_t format, int64_t n,
                    std::optional<Tensor> bias, bool exact) {
  constexpr const char* op = "quant_linear";
  const QuantLayout layout = check_format(op, format);
  const DType dtype = check_floating(op, "x", x);
  const Rows rows = rows_of(op, "x", x);
  check_packed(op, packed, layout, n, rows.row_size);
  check_device(op, "packed", packed, "x", x);
  if (bias) {
    check_shape(op, "bias", *bias, "[n]", {n});
    check_like(op, "bias", *bias, "x", x);
    check_contiguous(op, "bias", *bias);
  }
  const DeviceGuard guard(x);
  const auto* packed_data = static_cast<const uint8_t*>(packed.const_data_ptr());
  if constexpr (kOnCuda) {
    if (!exact && rows.num_rows > kMaxFusedRows && n > 0 && rows.row_size > 0) {
      Tensor weights = allocate(x, {n, rows.row_size});
      const DenseWeightsParams params{
          .packed = packed_data,
          .weights = weights.mutable_data_ptr(),
          .n = n,
          .k = rows.row_size,
          .format = layout.format,
          .dtype = dtype,
      };
      launch(op, launch_dense_weights, params, x);
      return linear(x, weights, bias);
    }
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  Tensor out = allocate(x, sizes);
  if (out.numel() == 0) return out;
  QuantLinearParams params{
      .x = x.const_data_ptr(),
      .packed = packed_data,
      .bias = bias ? bias->const_data_ptr() : nullptr,
      .out = out.mutable_data_ptr(),
      .workspace = nullptr,
      .m = rows.num_rows,
      .n = n,
      .k = rows.row_size,
      .x_row_stride = rows.row_stride,
      .format = layout.format,
      .dtype = dtype,
      .exact = exact,
  };
  std::optional<Tensor> workspace;
  if (const int64_t num_bytes = quant_linear_workspace_bytes(params)) {
    workspace = allocate(x, {num_bytes}, ScalarType::Byte);
    params.workspace = workspace->mutable_data_ptr();
  }
  launch(op, launch_quant_linear, params, x);
  return out;
}

}  // namespace

LT_IMPL(m) { m.impl("quant_linear", TORCH_BOX(&quant_linear)); }

}  // namespace llamatelemetry
