// What the ops*.cpp of the cache share: checks and views of caches.
#pragma once

#include <algorithm>

#include "binding/cache_scales.h"
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

// What a cache may hold.
inline void check_stored(const char* op, const char* arg, const Tensor& cache) {
  const std::optional<DType> dtype = dtype_of(cache.scalar_type());
  check(dtype && (is_floating(*dtype) || is_8_bit_cache(*dtype)), op, arg,
        "be float32, float16, bfloat16, float8_e4m3fn or int8", dtype_text(cache.scalar_type()));
}

// The two outer dimensions of a cache, the one of the shorter steps first, and its rows, in
// elements.
struct CacheGrid {
  int64_t strides[2];
  int64_t counts[2];
  int64_t row_size;
  int64_t extent;  // from the first element to past the last

  explicit CacheGrid(const Tensor& cache) : row_size(cache.size(2) * cache.size(3)) {
    for (int d = 0; d < 2; ++d) {
      counts[d] = cache.size(d);
      strides[d] = counts[d] == 1 ? 0 : cache.stride(d);
    }
    if (strides[0] > strides[1]) {
      std::swap(strides[0], strides[1]);
      std::swap(counts[0], counts[1]);
    }
    extent = row_size + strides[0] * (counts[0] - 1) + strides[1] * (counts[1] - 1);
  }
  // Whether no two of its rows share memory.
  bool is_apart() const {
    const int64_t inner = row_size + strides[0] * (counts[0] - 1);
    return (counts[0] == 1 || strides[0] >= row_size) && (counts[1] == 1 || strides[1] >= inner);
  }
  // Whether rows of it and of one of the same steps and sizes, distance >= 0 elements on, share
  // memory; both are apart in themselves.
  bool meets(int64_t distance) const {
    for (int64_t outer = 0; outer < 2; ++outer) {
      int64_t rest = distance;
      if (!step_over(1, outer, &rest)) continue;
      for (int64_t inner = 0; inner < 2; ++inner) {
        int64_t left = rest;
        if (step_over(0, inner, &left) && std::abs(left) < row_size) return true;
      }
    }
    return false;
  }

 private:
  // Takes from distance the whole steps of a dimension that fit, and `more`; whether there are as
  // many.
  bool step_over(int dim, int64_t more, int64_t* distance) const {
    if (counts[dim] == 1) return more == 0;
    const int64_t floor = *distance >= 0 ? *distance / strides[dim]
                                         : -((-*distance + strides[dim] - 1) / strides[dim]);
    const int64_t steps = floor + more;
    *distance -= steps * strides[dim];
    return std::abs(steps) < counts[dim];
  }
};

// Caches of one shape and dtype that are written: no row may be another's.
inline void check_written_apart(const char* op, const char* k_arg, const Tensor& k,
                                const char* v_arg, const Tensor& v) {
  if (k.numel() == 0) return;
  const CacheGrid k_grid(k), v_grid(v);
  for (const auto& [arg, grid] : {std::pair{k_arg, k_grid}, {v_arg, v_grid}}) {
    check(grid.is_apart(), op, arg, "not overlap itself",
          "strides " + std::to_string(grid.strides[1]) + " and " + std::to_string(grid.strides[0]) +
              " over rows of " + std::to_string(grid.row_size));
  }
  const auto element = static_cast<int64_t>(k.element_size());
  const int64_t distance = (reinterpret_cast<int64_t>(v.const_data_ptr()) -
                            reinterpret_cast<int64_t>(k.const_data_ptr())) /
                           element;
  const bool interleave = distance < k_grid.extent && -distance < v_grid.extent;
  const bool same_steps = std::equal(k_grid.strides, k_grid.strides + 2, v_grid.strides) &&
                          std::equal(k_grid.counts, k_grid.counts + 2, v_grid.counts);
  check(!interleave || (same_steps && !k_grid.meets(std::abs(distance))), op, v_arg,
        std::string("not overlap ") + k_arg,
        "memory " + std::to_string(distance) + " elements from it");
}

inline void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache) {
  check_stored(op, "k_cache", k_cache);
  check_cache(op, "k_cache", k_cache);
  check_cache(op, "v_cache", v_cache);
  check_shape(op, "v_cache", v_cache, "the shape of k_cache",
              {k_cache.size(0), k_cache.size(1), k_cache.size(2), k_cache.size(3)});
  check_like(op, "v_cache", v_cache, "k_cache", k_cache);
  check_written_apart(op, "k_cache", k_cache, "v_cache", v_cache);
}

// Dtype and device of x, whose rows are written to the cache: the cache's, or a dtype that is
// converted.
inline void check_written_to(const char* op, const char* arg, const Tensor& x,
                             const Tensor& k_cache) {
  const ScalarType stored = k_cache.scalar_type();
  if (is_converted(x, k_cache)) {
    check_floating(op, arg, x);
  } else {
    const bool takes_float32 = is_16_bit_cache(kOnCuda, DType::kFloat32, *dtype_of(stored));
    check(x.scalar_type() == stored, op, arg,
          std::string("have the dtype of k_cache (") + dtype_text(stored) + ")" +
              (takes_float32 ? " or float32" : ""),
          dtype_text(x.scalar_type()));
  }
  check_device(op, arg, x, "k_cache", k_cache);
}

// The dimensions of scales for each token and head, those of the shorter steps first, in elements.
struct ScaleGrid {
  int64_t strides[3];
  int64_t counts[3];
  int64_t extents[4];  // of the first i dimensions: from the first element to past the last

  explicit ScaleGrid(const Tensor& scales) {
    int order[3] = {0, 1, 2};
    const auto step = [&](int d) { return scales.size(d) == 1 ? 0 : scales.stride(d); };
    std::sort(order, order + 3, [&](int a, int b) { return step(a) < step(b); });
    extents[0] = 1;
    for (int i = 0; i < 3; ++i) {
      strides[i] = step(order[i]);
      counts[i] = scales.size(order[i]);
      extents[i + 1] = extents[i] + strides[i] * (counts[i] - 1);
    }
  }
  bool is_apart() const {
    for (int i = 0; i < 3; ++i) {
      if (counts[i] > 1 && strides[i] < extents[i]) return false;
    }
    return true;
  }
  // Whether one of the same steps and sizes, distance elements on, shares an element with it; both
  // are apart in themselves.
  bool meets(int64_t distance, int dims = 3) const {
    if (dims == 0) return distance == 0;
    const int64_t stride = strides[dims - 1], count = counts[dims - 1];
    if (count == 1) return meets(distance, dims - 1);
    const int64_t steps = distance / stride;
    for (int64_t more = -1; more <= 1; ++more) {
      const int64_t left = distance - (steps + more) * stride;
      if (std::abs(steps + more) < count && meets(left, dims - 1)) return true;
    }
    return false;
  }
};

// Scales that are written, which check_cache_scales has seen: none may be another's.
inline void check_scales_apart(const char* op, const std::optional<Tensor>& k_scales,
                               const std::optional<Tensor>& v_scales) {
  if (!k_scales || k_scales->dim() != 3 || v_scales->dim() != 3 || k_scales->numel() == 0) return;
  const ScaleGrid k(*k_scales), v(*v_scales);
  check(k.is_apart(), op, "k_scales", "not overlap itself", "strides that do");
  check(v.is_apart(), op, "v_scales", "not overlap itself", "strides that do");
  const int64_t distance = v_scales->const_data_ptr<float>() - k_scales->const_data_ptr<float>();
  const bool interleave = distance < k.extents[3] && -distance < v.extents[3];
  const bool same_steps = std::equal(k.strides, k.strides + 3, v.strides) &&
                          std::equal(k.counts, k.counts + 3, v.counts);
  check(!interleave || (same_steps && !k.meets(distance)), op, "v_scales", "not overlap k_scales",
        "memory " + std::to_string(distance) + " elements from it");
}

// Scales of one of the caches, which check_cache_scales has seen.
inline CacheScales cache_scales_of(std::optional<Tensor>& scales) {
  if (!scales) return {};
  const ScaleStrides strides = scale_strides_of(*scales);
  return {scales->mutable_data_ptr<float>(), strides.block, strides.slot, strides.head,
          scales->dim() == 1};
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
  const auto element = static_cast<int64_t>(source.element_size());
  CachePlane plane = plane_of(cache);
  plane.source = source.const_data_ptr();
  plane.token_stride_bytes = source.stride(0) * element;
  plane.head_stride_bytes = source.stride(1) * element;
  return plane;
}

inline BlockPlane block_plane_of(const Tensor& from, Tensor& to) {
  const auto element = static_cast<int64_t>(to.element_size());
  return {.from = from.const_data_ptr(),
          .from_block_stride_bytes = from.stride(0) * element,
          .from_slot_stride_bytes = from.stride(1) * element,
          .to = to.mutable_data_ptr(),
          .to_block_stride_bytes = to.stride(0) * element,
          .to_slot_stride_bytes = to.stride(1) * element};
}

// The widest copy, up to 16 bytes, that every address allows.
inline int copy_bytes_of(const BlockPlane (&planes)[2], int64_t row_bytes) {
  int64_t all = row_bytes | 16;
  for (const BlockPlane& plane : planes) {
    all |= reinterpret_cast<int64_t>(plane.from) | reinterpret_cast<int64_t>(plane.to);
    all |= plane.from_block_stride_bytes | plane.from_slot_stride_bytes;
    all |= plane.to_block_stride_bytes | plane.to_slot_stride_bytes;
  }
  return static_cast<int>(all & -all);  // the lowest bit set
}

inline void check_pairs(const char* op, const Tensor& block_pairs, const char* like_arg,
                        const Tensor& like) {
  check_dim(op, "block_pairs", block_pairs, 2, "[num_pairs, 2]");
  check_shape(op, "block_pairs", block_pairs, "[num_pairs, 2]", {block_pairs.size(0), 2});
  check_dtype(op, "block_pairs", block_pairs, ScalarType::Long);
  check_device(op, "block_pairs", block_pairs, like_arg, like);
  check_contiguous(op, "block_pairs", block_pairs);
}

inline void check_slots(const char* op, const Tensor& slot_mapping, int64_t num_tokens,
                        const Tensor& k_cache) {
  check_shape(op, "slot_mapping", slot_mapping, "[num_tokens]", {num_tokens});
  check_dtype(op, "slot_mapping", slot_mapping, ScalarType::Long);
  check_device(op, "slot_mapping", slot_mapping, "k_cache", k_cache);
  check_contiguous(op, "slot_mapping", slot_mapping);
}

}  // namespace llamatelemetry
