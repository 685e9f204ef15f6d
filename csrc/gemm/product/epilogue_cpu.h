// What becomes of a row of sums on the CPU, whichever kernel made them.
#pragma once

#include "gemm/product/params.h"
#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename Sum, typename Out>
void finish_row(const ProductParams& p, int64_t batch, int64_t row, int64_t column, int64_t count,
                const Sum* sums, Out* out) {
  const float scale = p.row_scales ? p.alpha * p.row_scales[row] : p.alpha;
  const Out* c = static_cast<const Out*>(p.c);
  if (c) c += batch * p.c_batch_stride + row * p.c_row_stride;
  const Out* bias = static_cast<const Out*>(p.bias);
  for (int64_t i = column; i < column + count; ++i) {
    float value = scale * static_cast<float>(sums[i - column]);
    if (p.column_scales) value *= p.column_scales[i];
    if (bias) value += to_float(bias[i]);
    if (c) value += p.beta * to_float(c[i]);
    out[i - column] = from_float<Out>(value);
  }
}

template <typename Sum>
void store_row(const ProductParams& p, int64_t batch, int64_t row, int64_t column, int64_t count,
               const Sum* sums) {
  const int64_t at = (batch * p.m + row) * p.n + column;
  switch (p.out_type) {
    case ProductOut::kInt32:
      for (int64_t i = 0; i < count; ++i) {
        static_cast<int32_t*>(p.out)[at + i] = static_cast<int32_t>(sums[i]);
      }
      return;
    case ProductOut::kFloat16:
      return finish_row(p, batch, row, column, count, sums, static_cast<Half*>(p.out) + at);
    case ProductOut::kBFloat16:
      return finish_row(p, batch, row, column, count, sums, static_cast<BFloat16*>(p.out) + at);
    case ProductOut::kFloat32:
      return finish_row(p, batch, row, column, count, sums, static_cast<float*>(p.out) + at);
  }
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
