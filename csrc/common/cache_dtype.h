// What a KV cache may hold beside the floating types of kernels. Torch-free.
#pragma once

#include "common/dtype.h"

namespace llamatelemetry {

// Numbers of 8 bits, with scales.
static inline constexpr bool is_8_bit_cache(DType dtype) {
  return dtype == DType::kFloat8E4M3 || dtype == DType::kInt8;
}

static inline constexpr bool is_16_bit(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

// Numbers of 16 bits beside queries, keys and values of float32, which the CPU alone converts, as
// it reads and writes them.
static inline constexpr bool is_16_bit_cache(bool on_cuda, DType dtype, DType stored) {
  return !on_cuda && dtype == DType::kFloat32 && is_16_bit(stored);
}

}  // namespace llamatelemetry
