// Whole tensors of packed weights: checks, allocation and Params, compiled once for each library.
#include <optional>
#include <string>
#include <vector>

#include "binding/launch.h"
#include "format/checks.h"
#include "quant/params.h"

namespace llamatelemetry {
namespace {

// Rows of whole blocks.
Rows check_blocks(const char* op, const Tensor& data, int format) {
  const BlockLayout& layout = kFormats[format].fields;
  check_dtype(op, "data", data, ScalarType::Byte);
  const Rows rows = rows_of(op, "data", data);
  check(rows.row_size % layout.block_bytes == 0, op, "data",
        std::string("have rows of whole ") + kFormats[format].name + " blocks of " +
            std::to_string(layout.block_bytes) + " bytes",
        "shape " + shape_text(data));
  return rows;
}

Tensor dequantize(const Tensor& data, StringHandle format_name, ScalarType dtype,
                  std::optional<Tensor> scales, std::optional<Tensor> zeros,
                  std::optional<Tensor> perm) {
  constexpr const char* op = "dequantize";
  const int format = check_block_format(op, take_string(format_name));
  check_side_tensors(op, format, scales, zeros, perm);
  const BlockLayout& layout = kFormats[format].fields;
  const DType out_dtype = check_floating(op, "dtype", dtype);
  const Rows rows = check_blocks(op, data, format);
  const int64_t blocks_per_row = rows.row_size / layout.block_bytes;
  std::vector<int64_t> sizes(data.sizes().begin(), data.sizes().end());
  sizes.back() = blocks_per_row * layout.block_size;
  const DeviceGuard guard(data);
  Tensor out = allocate(data, sizes, dtype);
  if (out.numel() == 0) return out;
  const DequantizeParams params{
      .data = static_cast<const uint8_t*>(data.const_data_ptr()),
      .out = out.mutable_data_ptr(),
      .num_rows = rows.num_rows,
      .blocks_per_row = blocks_per_row,
      .row_stride_bytes = rows.row_stride,
      .format = format,
      .dtype = out_dtype,
  };
  launch(op, launch_dequantize, params, data);
  return out;
}

Tensor repack(const Tensor& data, StringHandle format_name, StringHandle layout_name) {
  constexpr const char* op = "repack";
  const std::string packed_layout = take_string(layout_name);
  const int format = check_format(op, take_string(format_name));
  check_packed_layout(op, packed_layout);
  check_dim(op, "data", data, 2, "[n, row_bytes]");
  const Rows rows = check_blocks(op, data, format);
  const DeviceGuard guard(data);
  Tensor packed = allocate(data, {num_tiles(rows.num_rows), kTileRows * rows.row_size});
  if (packed.numel() == 0) return packed;
  const BlockLayout layout = block_layout(format);
  const RepackParams params{
      .rows = static_cast<const uint8_t*>(data.const_data_ptr()),
      .packed = static_cast<uint8_t*>(packed.mutable_data_ptr()),
      .sizes = {.n = rows.num_rows,
                .blocks_per_row = rows.row_size / layout.block_bytes,
                .row_stride_bytes = rows.row_stride,
                .layout = layout},
  };
  launch(op, launch_repack, params, data);
  return packed;
}

Tensor unpack(const Tensor& packed, StringHandle format_name, int64_t n, int64_t k,
              StringHandle layout_name) {
  constexpr const char* op = "unpack";
  const std::string packed_layout = take_string(layout_name);
  const int format = check_format(op, take_string(format_name));
  check_packed_layout(op, packed_layout);
  check_packed(op, packed, format, n, k);
  const int64_t row_bytes = check_row_bytes(op, format, k);
  const DeviceGuard guard(packed);
  Tensor data = allocate(packed, {n, row_bytes});
  if (data.numel() == 0) return data;
  const BlockLayout layout = block_layout(format);
  const UnpackParams params{
      .rows = static_cast<uint8_t*>(data.mutable_data_ptr()),
      .packed = static_cast<const uint8_t*>(packed.const_data_ptr()),
      .sizes = {.n = n,
                .blocks_per_row = k / layout.block_size,
                .row_stride_bytes = row_bytes,
                .layout = layout},
  };
  launch(op, launch_unpack, params, packed);
  return data;
}

Tensor quant_embedding(const Tensor& ids, const Tensor& packed, StringHandle format_name, int64_t n,
                       int64_t k, ScalarType dtype, std::optional<Tensor> scales,
                       std::optional<Tensor> zeros, std::optional<Tensor> perm) {
  constexpr const char* op = "quant_embedding";
  const int format = check_block_format(op, take_string(format_name));
  check_side_tensors(op, format, scales, zeros, perm);
  const bool ids_are_int64 = ids.scalar_type() == ScalarType::Long;
  check(ids_are_int64 || ids.scalar_type() == ScalarType::Int, op, "ids", "be int64 or int32",
        dtype_text(ids.scalar_type()));
  check_contiguous(op, "ids", ids);
  check_packed(op, packed, format, n, k);
  check_device(op, "ids", ids, "packed", packed);
  const DType out_dtype = check_floating(op, "dtype", dtype);
  const DeviceGuard guard(packed);
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(k);
  Tensor out = allocate(packed, sizes, dtype);
  if (out.numel() == 0) return out;
  const QuantEmbeddingParams params{
      .ids = ids.const_data_ptr(),
      .packed = static_cast<const uint8_t*>(packed.const_data_ptr()),
      .out = out.mutable_data_ptr(),
      .num_ids = ids.numel(),
      .n = n,
      .k = k,
      .format = format,
      .dtype = out_dtype,
      .ids_are_int64 = ids_are_int64,
  };
  launch(op, launch_quant_embedding, params, packed);
  return out;
}

}  // namespace

LT_IMPL(m) {
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("repack", TORCH_BOX(&repack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("quant_embedding", TORCH_BOX(&quant_embedding));
}

}  // namespace llamatelemetry
