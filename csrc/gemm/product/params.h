// What the launchers of csrc/gemm/product/ take: products of two matrices, both operands seen as
// rows along the depth k, so that a[m, k] and b[n, k] are one kind of thing.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"

namespace llamatelemetry {

// A byte of float8_e4m3fn.
struct E4M3 {
  uint8_t bits;
};

// Rows of one operand: element (batch, row, depth) is data[batch * batch_stride + row * row_stride
// + depth * k_stride]. Strides in elements.
struct Operand {
  const void* data;
  int64_t rows;  // m of a, n of b
  int64_t batch_stride;
  int64_t row_stride;
  int64_t k_stride;
};

enum class ProductOut : int8_t { kFloat32, kFloat16, kBFloat16, kInt32 };

// Which kernel: gemm/product/choice.h.
enum class ProductImpl : int8_t { kSm90, kSm80, kSm75, kSimt, kCpu };

constexpr int kScaleBlock = 128;  // of k and of n, that share a scale

// out = alpha * (a . b^T) * row_scales * column_scales + bias + beta * c, rounded once. Sums are
// float32, of int8 int32. With scales of blocks, of e4m3 and of float16 that was e4m3, the sums
// over kScaleBlock of k are multiplied before they are added.
struct ProductParams {
  Operand a;
  Operand b;
  const void* c;  // [batch, m, n] of the type of out, rows contiguous, or null
  int64_t c_batch_stride;
  int64_t c_row_stride;
  const float* row_scales;     // [m] or null
  const float* column_scales;  // [n] or null
  const float* row_blocks;     // [m, blocks of k] or null, likewise column_blocks
  const float* column_blocks;  // [blocks of n, blocks of k]
  const void* bias;            // [n] of the type of out, or null
  void* out;                   // [batch, m, n], contiguous
  int64_t batch;
  int64_t m;
  int64_t n;
  int64_t k;
  float alpha;
  float beta;
  DType dtype;  // of a and b
  ProductOut out_type;
  ProductImpl impl;
};
Error launch_product(const ProductParams& params, Stream stream);

// CUDA: what launch_product hands the others to.
Error launch_product_few_rows(const ProductParams& params, Stream stream);
Error launch_product_some_rows(const ProductParams& params, Stream stream);
Error launch_product_sm75(const ProductParams& params, Stream stream);
Error launch_product_sm80(const ProductParams& params, Stream stream);
Error launch_product_wgmma_f16(const ProductParams& params, Stream stream);
Error launch_product_wgmma_bf16(const ProductParams& params, Stream stream);
Error launch_product_wgmma_s8(const ProductParams& params, Stream stream);
Error launch_product_wgmma_e4m3(const ProductParams& params, Stream stream);

// CUDA: rows that no kernel can load 16 bytes at a time, copied to ones it can.
struct PackRowsParams {
  Operand from;
  void* to;  // [batch, rows, padded_k]
  int64_t batch;
  int64_t k;
  int64_t padded_k;
  int element_bytes;  // of from
  bool widens;        // from e4m3 to float16
};
Error launch_pack_rows(const PackRowsParams& params, Stream stream);

}  // namespace llamatelemetry
