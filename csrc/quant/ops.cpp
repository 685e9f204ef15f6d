// Whole tensors of packed weights: checks, allocation and Params, compiled once for each library.
#include <vector>

#include "common/checks.h"
#include "quant/gguf_blocks.h"
#include "quant/params.h"

namespace llamatelemetry {
namespace {

Tensor dequantize(const Tensor& data, int64_t format, ScalarType dtype) {
  constexpr const char* op = "dequantize";
  check_dtype(op, "data", data, ScalarType::Byte);
  const DType out_dtype = check_floating(op, "dtype", dtype);
  const Rows rows = rows_of(op, "data", data);
  std::vector<int64_t> sizes(data.sizes().begin(), data.sizes().end());
  int64_t blocks_per_row = 0;
  const bool known = GgufFormats::dispatch(format, [&](auto number) {
    using Format = Block<number()>;
    check(rows.row_size % Format::kBytes == 0, op, "data",
          std::string("have rows of whole ") + Format::kName + " blocks of " +
              std::to_string(Format::kBytes) + " bytes",
          "shape " + shape_text(data));
    blocks_per_row = rows.row_size / Format::kBytes;
    sizes.back() = blocks_per_row * Format::kWeights;
  });
  check(known, op, "format", "be a GGML type number of " + GgufFormats::text(),
        std::to_string(format));
  const DeviceGuard guard(data);
  Tensor out = allocate(data, sizes, dtype);
  if (out.numel() == 0) return out;
  const DequantizeParams params{
      .data = static_cast<const uint8_t*>(data.const_data_ptr()),
      .out = out.mutable_data_ptr(),
      .num_rows = rows.num_rows,
      .blocks_per_row = blocks_per_row,
      .row_stride_bytes = rows.row_stride,
      .format = static_cast<int>(format),
      .dtype = out_dtype,
  };
  launch(op, launch_dequantize, params, data);
  return out;
}

}  // namespace

LT_IMPL(m) { m.impl("dequantize", TORCH_BOX(&dequantize)); }

}  // namespace llamatelemetry
