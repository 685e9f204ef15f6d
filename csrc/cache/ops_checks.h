// What the ops*.cpp of the cache share: checks and views of caches.
#pragma once

#include "binding/checks.h"
#include "cache/params.h"

namespace llamatelemetry {

// Any block and slot strides, so a cache may be a view (one layer of all, K beside V).
inline void check_cache(const char* op, const char* arg, const Tensor& cache) {
  check_dim(op, arg, cache, 4, "[num_blocks, page_size, num_heads_kv, head_dim]");
  check_last_contiguous(op, arg, cache);
  check(cache.numel() == 0 || cache.size(2) == 1 || cache.stride(2) == cache.size(3), op, arg,
        "have contiguous heads (stride head_dim = " + std::to_string(cache.size(3)) + ")",
        "stride " + std::to_string(cache.stride(2)));
}

inline void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache) {
  check_floating(op, "k_cache", k_cache);
  check_cache(op, "k_cache", k_cache);
  check_cache(op, "v_cache", v_cache);
  check_shape(op, "v_cache", v_cache, "the shape of k_cache",
              {k_cache.size(0), k_cache.size(1), k_cache.size(2), k_cache.size(3)});
  check_like(op, "v_cache", v_cache, "k_cache", k_cache);
}

inline CachePlane plane_of(Tensor& cache) {
  const auto element = static_cast<int64_t>(cache.element_size());
  return {.source = nullptr,
          .token_stride_bytes = 0,
          .head_stride_bytes = 0,
          .cache = cache.mutable_data_ptr(),
          .block_stride_bytes = cache.stride(0) * element,
          .slot_stride_bytes = cache.stride(1) * element};
}

inline CachePlane plane_of(const Tensor& source, Tensor& cache) {
  const auto element = static_cast<int64_t>(cache.element_size());
  CachePlane plane = plane_of(cache);
  plane.source = source.const_data_ptr();
  plane.token_stride_bytes = source.stride(0) * element;
  plane.head_stride_bytes = source.stride(1) * element;
  return plane;
}

inline void check_slots(const char* op, const Tensor& slot_mapping, int64_t num_tokens,
                        const Tensor& k_cache) {
  check_shape(op, "slot_mapping", slot_mapping, "[num_tokens]", {num_tokens});
  check_dtype(op, "slot_mapping", slot_mapping, ScalarType::Long);
  check_device(op, "slot_mapping", slot_mapping, "k_cache", k_cache);
  check_contiguous(op, "slot_mapping", slot_mapping);
}

}  // namespace llamatelemetry
