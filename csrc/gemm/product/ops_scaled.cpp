// Linear layers of quantised rows over quantised weights, a byte a value: checks, allocation and
// Params, compiled once for each library.
#include <optional>
#include <string>
#include <vector>

#include "gemm/product/ops_common.h"

namespace llamatelemetry {
namespace {

const float* check_scales(const char* op, const char* arg, const Tensor& scales, const Tensor& like,
                          const char* like_arg) {
  check_dtype(op, arg, scales, ScalarType::Float);
  check_device(op, arg, scales, like_arg, like);
  check_contiguous(op, arg, scales);
  return static_cast<const float*>(scales.const_data_ptr());
}

// A scale a row, of whatever shape.
void check_row_scales(const char* op, const char* arg, const Tensor& scales, int64_t count,
                      const char* like_arg) {
  check(scales.numel() == count, op, arg,
        "have a scale for each of the " + std::to_string(count) + " rows of " + like_arg,
        "shape " + shape_text(scales));
}

int64_t scale_blocks(int64_t size) { return (size + kScaleBlock - 1) / kScaleBlock; }

// Scales of blocks lie as the blocks do: as many in another order would be multiplied wrongly.
void check_block_scales(const char* op, const Tensor& x, const Tensor& x_scales,
                        const Tensor& weight, const Tensor& weight_scales) {
  const int64_t last = x.dim() - 1, of_row = scale_blocks(x.size(last));
  bool alike = x_scales.dim() == x.dim() && x_scales.size(last) == of_row;
  for (int64_t d = 0; alike && d < last; ++d) alike = x_scales.size(d) == x.size(d);
  check(alike, op, "x_scales",
        "be [..., ceil(k / 128)], the leading sizes of x (" + shape_text(x) + ") and " +
            std::to_string(of_row) + " blocks",
        "shape " + shape_text(x_scales));
  check_shape(op, "weight_scales", weight_scales, "[ceil(n / 128), ceil(k / 128)]",
              {scale_blocks(weight.size(0)), of_row});
}

// x and weight, of one dtype: that.
DType check_bytes(const char* op, const Tensor& x, const Tensor& weight, int64_t k) {
  check(x.scalar_type() == ScalarType::Char || x.scalar_type() == ScalarType::Float8_e4m3fn, op,
        "x", "be int8 or float8_e4m3fn", dtype_text(x.scalar_type()));
  const DType dtype = *dtype_of(x.scalar_type());
  check_dim(op, "weight", weight, 2, "[n, k]");
  check_shape(op, "weight", weight, "[n, k]", {weight.size(0), k});
  check_like(op, "weight", weight, "x", x);
  check(dtype != DType::kInt8 || k <= kMaxInt8Depth, op, "x",
        "have a depth of at most " + std::to_string(kMaxInt8Depth) + ", whose sums fit int32",
        std::to_string(k));
  return dtype;
}

Tensor scaled_linear(const Tensor& x, const Tensor& x_scales, const Tensor& weight,
                     const Tensor& weight_scales, ScalarType out_dtype, std::optional<Tensor> bias,
                     std::optional<int64_t> block) {
  constexpr const char* op = "scaled_linear";
  const Rows rows = rows_of(op, "x", x);
  const DType dtype = check_bytes(op, x, weight, rows.row_size);
  const int64_t n = weight.size(0), k = rows.row_size;
  const DType out = check_floating(op, "dtype", out_dtype);
  check(!block || *block == kScaleBlock, op, "block", "be None or " + std::to_string(kScaleBlock),
        std::to_string(block.value_or(0)));
  check(!block || dtype == DType::kFloat8E4M3, op, "block", "be None for int8",
        std::to_string(block.value_or(0)));
  const float* row_scales = check_scales(op, "x_scales", x_scales, x, "x");
  const float* column_scales = check_scales(op, "weight_scales", weight_scales, weight, "weight");
  if (block) {
    check_block_scales(op, x, x_scales, weight, weight_scales);
  } else {
    check_row_scales(op, "x_scales", x_scales, rows.num_rows, "x");
    check_row_scales(op, "weight_scales", weight_scales, n, "weight");
  }
  if (bias) {
    check_shape(op, "bias", *bias, "[n]", {n});
    check_dtype(op, "bias", *bias, out_dtype);
    check_device(op, "bias", *bias, "x", x);
    check_contiguous(op, "bias", *bias);
  }
  const DeviceGuard guard(x);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  Tensor result = allocate(x, sizes, out_dtype);
  if (result.numel() == 0) return result;
  ProductParams params{
      .a = {x.const_data_ptr(), rows.num_rows, 0, rows.row_stride, 1},
      .b = {weight.const_data_ptr(), n, 0, weight.stride(0), weight.stride(1)},
      .c = nullptr,
      .c_batch_stride = 0,
      .c_row_stride = 0,
      .row_scales = block ? nullptr : row_scales,
      .column_scales = block ? nullptr : column_scales,
      .row_blocks = block && k > 0 ? row_scales : nullptr,
      .column_blocks = block && k > 0 ? column_scales : nullptr,
      .bias = bias ? bias->const_data_ptr() : nullptr,
      .out = result.mutable_data_ptr(),
      .batch = 1,
      .m = rows.num_rows,
      .n = n,
      .k = k,
      .alpha = 1.0f,
      .beta = 0.0f,
      .dtype = dtype,
      .out_type = out_type_of(out),
      .impl = ProductImpl::kCpu,
  };
  const DType computed = product_dtype(params);  // of what the kernel reads
  const std::optional<Tensor> packed_x = pack_if_needed(op, params, computed, x, params.a);
  const std::optional<Tensor> packed_w = pack_if_needed(op, params, computed, weight, params.b);
  params.dtype = computed;
  params.impl = choose_product(descriptor_of(params));
  launch(op, launch_product, params, x);
  return result;
}

}  // namespace

LT_IMPL(m) { m.impl("scaled_linear", TORCH_BOX(&scaled_linear)); }

}  // namespace llamatelemetry
