// Of the products that choice.h sends to Hopper's kernel, those that some_rows.cuh takes.
#pragma once

#include <cstdint>

#include "gemm/product/params.h"

namespace llamatelemetry {

constexpr int64_t kMostSomeRows = 64;  // a tile
// Up to here tiles have 64 columns, so that most multiprocessors have one; of more, 128, which read
// less of a.
static inline constexpr bool has_narrow_tiles(int64_t n, int num_sms) {
  return n <= int64_t{128} * num_sms;
}

static inline bool takes_some_rows(const ProductParams& p) {
  const bool scaled = p.row_scales != nullptr || p.row_blocks != nullptr;
  return p.impl == ProductImpl::kSm90 && scaled && dtype_bytes(p.dtype) == 1 && p.batch == 1 &&
         p.m <= kMostSomeRows;
}

Error launch_product_some_rows(const ProductParams& params, Stream stream);

}  // namespace llamatelemetry
