// A head's float32 row for a cache of 16 bits, on the CPU.
#pragma once

#include "common/cache_dtype.h"
#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr Error kNotConverted = "rows of this dtype are not converted to that of the cache";

template <typename T>
void round_row(const float* x, int64_t size, T* to) {
  for_each_vec(size,
               [=](int64_t i, auto lanes) { vec_store(to + i, lanes, vec_load(x + i, lanes)); });
}

// To nearest, ties to even; from 65520 on float16 is infinite.
void store_row_in_16_bits(const float* x, int64_t head_dim, DType stored, void* to) {
  if (stored == DType::kFloat16) {
    round_row(x, head_dim, static_cast<Half*>(to));
  } else {
    round_row(x, head_dim, static_cast<BFloat16*>(to));
  }
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
