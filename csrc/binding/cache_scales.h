// Caches of another dtype than the activations, and the scales of those of 8 bits: checks and
// strides, shared by the rooms cache and attention.
#pragma once

#include <optional>
#include <utility>

#include "binding/checks.h"
#include "common/cache_dtype.h"

namespace llamatelemetry {

inline bool is_8_bit(const Tensor& cache) {
  const std::optional<DType> dtype = dtype_of(cache.scalar_type());
  return dtype && is_8_bit_cache(*dtype);
}

// Whether kernels convert between x and a cache of its keys or values: one of 8 bits, or on the
// CPU of 16 beside float32.
inline bool is_converted(const Tensor& x, const Tensor& cache) {
  const std::optional<DType> dtype = dtype_of(x.scalar_type());
  const std::optional<DType> stored = dtype_of(cache.scalar_type());
  return is_8_bit(cache) || (dtype && stored && is_16_bit_cache(kOnCuda, *dtype, *stored));
}

// A scale for each token and head, [num_blocks, page_size, num_heads_kv] of any strides, or one for
// the tensor, [1]; none beside caches of other types.
inline void check_cache_scales(const char* op, const Tensor& k_cache,
                               const std::optional<Tensor>& k_scales,
                               const std::optional<Tensor>& v_scales) {
  const char* const stored = dtype_text(k_cache.scalar_type());
  for (const auto& [arg, scales] :
       {std::pair<const char*, const std::optional<Tensor>&>{"k_scales", k_scales},
        {"v_scales", v_scales}}) {
    if (!is_8_bit(k_cache)) {
      check(!scales.has_value(), op, arg, "be None but beside caches of float8_e4m3fn or int8",
            std::string("one beside ") + stored);
      continue;
    }
    check(scales.has_value(), op, arg, std::string("be given beside a k_cache of ") + stored,
          "None");
    if (scales->dim() != 1 || scales->size(0) != 1) {
      check_shape(op, arg, *scales, "[1], or [num_blocks, page_size, num_heads_kv] as k_cache",
                  {k_cache.size(0), k_cache.size(1), k_cache.size(2)});
    }
    check_dtype(op, arg, *scales, ScalarType::Float);
    check_device(op, arg, *scales, "k_cache", k_cache);
  }
}

// Elements from one block, slot and head to the next.
struct ScaleStrides {
  int64_t block;
  int64_t slot;
  int64_t head;
};
inline ScaleStrides scale_strides_of(const Tensor& scales) {
  if (scales.dim() == 1) return {0, 0, 0};
  return {scales.stride(0), scales.stride(1), scales.stride(2)};
}

}  // namespace llamatelemetry
