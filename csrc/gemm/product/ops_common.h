// What the ops of products share: which kernel, and rows that it can load.
#pragma once

#include <optional>

#include "binding/launch.h"
#include "common/device.h"
#include "gemm/product/choice.h"
#include "gemm/product/params.h"

namespace llamatelemetry {

constexpr int64_t kMaxInt8Depth = 131071;  // of -128 by -128, whose sum is int32's

inline ProductDescriptor descriptor_of(const ProductParams& p) {
  ProductDescriptor d{.k = p.k,
                      .dtype = p.dtype,
                      .on_cuda = kOnCuda,
                      .capability = 0,
                      .code_capability = 0,
                      .has_sm90_code = false};
#ifdef LT_CUDA
  d.capability = current_device().capability;
  d.code_capability = current_device().code_capability;
#ifdef LT_SM90
  d.has_sm90_code = true;
#endif
#endif
  return d;
}

// What the kernel reads: bytes of e4m3 are float16, which holds them all, where no tensor cores
// take them.
inline DType product_dtype(const ProductParams& p) {
  const bool widened =
      kOnCuda && p.dtype == DType::kFloat8E4M3 && !serves(ProductImpl::kSm90, descriptor_of(p));
  return widened ? DType::kFloat16 : p.dtype;
}

// Makes x, of the dtype of p, rows of `to` that the kernels of CUDA can load; what the result holds
// must outlive the launch.
inline std::optional<Tensor> pack_if_needed(const char* op, const ProductParams& p, DType to,
                                            const Tensor& like, Operand& x) {
  if constexpr (kPacksRows) {
    const int64_t bytes = dtype_bytes(to);
    const OperandLayout layout = layout_of(x, p.batch, p.k, bytes);
    const bool served =
        to == p.dtype && (layout == OperandLayout::kAlongK ||
                          (layout == OperandLayout::kAlongRows && takes_rows(p.dtype)));
    if (served || p.k == 0) return std::nullopt;
    const int64_t unit = kLoadBytes / bytes, padded_k = (p.k + unit - 1) / unit * unit;
    const int64_t batch = x.batch_stride == 0 ? 1 : p.batch;
    Tensor rows = allocate(like, {batch, x.rows, padded_k * bytes}, ScalarType::Byte);
    const PackRowsParams params{.from = x,
                                .to = rows.mutable_data_ptr(),
                                .batch = batch,
                                .k = p.k,
                                .padded_k = padded_k,
                                .element_bytes = dtype_bytes(p.dtype),
                                .widens = to != p.dtype};
    launch(op, launch_pack_rows, params, like);
    x = {.data = rows.const_data_ptr(),
         .rows = x.rows,
         .batch_stride = batch > 1 ? x.rows * padded_k : 0,
         .row_stride = padded_k,
         .k_stride = 1};
    return rows;
  }
  return std::nullopt;
}

inline ProductOut out_type_of(DType dtype) {
  if (dtype == DType::kFloat32) return ProductOut::kFloat32;
  return dtype == DType::kFloat16 ? ProductOut::kFloat16 : ProductOut::kBFloat16;
}

}  // namespace llamatelemetry
