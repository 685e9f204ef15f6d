// Row ops: checks, allocation and Params, compiled once for each library.
#include "common/checks.h"
#include "norm/params.h"

namespace llamatelemetry {
namespace {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  constexpr const char* op = "rms_norm";
  const DType dtype = check_floating(op, "x", x);
  const Rows rows = rows_of(op, "x", x);  // leading dimensions folded
  check_shape(op, "weight", weight, "[hidden_size]", {rows.row_size});
  check_like(op, "weight", weight, "x", x);
  check_contiguous(op, "weight", weight);
  const DeviceGuard guard(x);
  Tensor out = allocate(x, x.sizes());
  if (x.numel() == 0) return out;  // an empty grid is a launch error
  const RmsNormParams params{
      .x = x.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .num_tokens = rows.num_rows,
      .hidden_size = rows.row_size,
      .x_row_stride = rows.row_stride,
      .eps = static_cast<float>(eps),
      .dtype = dtype,
  };
  launch(op, launch_rms_norm, params, x);
  return out;
}

}  // namespace

LT_IMPL(m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace llamatelemetry
