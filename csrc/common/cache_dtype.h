// What a KV cache may hold beside the floating types of kernels. Torch-free.
#pragma once

#include "common/dtype.h"

namespace llamatelemetry {

// Numbers of 8 bits, with scales.
static inline constexpr bool is_8_bit_cache(DType dtype) {
  return dtype == DType::kFloat8E4M3 || dtype == DType::kInt8;
}

}  // namespace llamatelemetry
