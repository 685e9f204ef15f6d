// rope_append_kv_: of each token's packed q, k and v the optional norm of each head of q and k
// (rms_norm.cuh's), the rotary embedding of both in place (rotary_embedding.cuh's), and the cache
// write of k and v, in one launch. Rounds where the three launches would.
// Bound by latency or bandwidth: a warp a head of a token, its row in registers. A lane's partner
// in the rotation is another lane's, so rows of q and k meet in shared memory, after their norm.
// Grid: warps over tokens and their heads, block kNumWarps * 32.
#pragma once

#include "cache/eight_bit.cuh"
#include "cache/params.h"
#include "tile/dependent_launch.cuh"
#include "tile/reduce.cuh"
#include "tile/rotate.cuh"

namespace llamatelemetry {

template <typename T, int kElements, int kNumWarps>
struct RopeAppend {
  using V = Vector<T, kElements>;
  static constexpr int kStep = kWarpSize * kElements;
  static constexpr int kSteps = (kMaxRopeHeadDim + kStep - 1) / kStep;

  const RopeAppendKvParams& p;
  const int64_t token;
  const int head;   // of q, then of k, then of v
  const int first;  // element of the lane
  T* const row;
  V x[kSteps];

  __device__ RopeAppend(const RopeAppendKvParams& params, int64_t token, int head)
      : p(params),
        token(token),
        head(head),
        first(threadIdx.x % kWarpSize * kElements),
        row(static_cast<T*>(p.qkv) + token * p.token_stride + head * p.head_stride) {}

  __device__ void run(T* s_row) {
    for_each([&](int at, V& value) { value = *reinterpret_cast<const V*>(row + at); });
    if (head < p.num_heads_q + p.num_heads_kv) {
      const void* weight = head < p.num_heads_q ? p.q_weight : p.k_weight;
      if (weight != nullptr) normalise(static_cast<const T*>(weight));
      for_each([&](int at, V& value) { *reinterpret_cast<V*>(s_row + at) = value; });
      __syncwarp();
      rotate(s_row);
      for_each([&](int at, V& value) { *reinterpret_cast<V*>(row + at) = value; });
    }
    if (head >= p.num_heads_q) append();
  }

 private:
  template <typename Each>
  __device__ void for_each(Each each) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = first + step * kStep;
      if (at < p.head_dim) each(at, x[step]);
    }
  }

  __device__ void normalise(const T* weight) {
    float sum = 0.0f;
    for_each([&](int, const V& value) {
#pragma unroll
      for (const T element : value.value) sum = fmaf(to_float(element), to_float(element), sum);
    });
    const auto size = static_cast<float>(p.head_dim);
    const float rstd = rsqrtf(warp_reduce<Sum>(sum) * (1.0f / size) + p.eps);
    const float offset = p.weight_offset;
    for_each([&](int at, V& value) {
      const V& w = *reinterpret_cast<const V*>(weight + at);
      if (offset != 0.0f) {
        value = map_vector(value, w, [=](float v, float u) { return v * rstd * (u + offset); });
      } else {
        const V normalised = map_vector(value, [=](float v) { return v * rstd; });
        value = map_vector(normalised, w, [](float n, float u) { return n * u; });
      }
    });
  }

  __device__ void rotate(const T* s_row) {
    int64_t position = token;
    if (p.positions) {
      position = p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[token]
                                       : static_cast<const int32_t*>(p.positions)[token];
    }
    const bool known = position >= 0 && position < p.num_positions;
    const auto size = static_cast<int>(p.rotary_dim);
    const T* cos = static_cast<const T*>(p.cos) + position * p.cos_row_stride;
    const T* sin = static_cast<const T*>(p.sin) + position * p.sin_row_stride;
    for_each([&](int at, V& value) {
      if (at >= size) return;
      if (!known) {
        value = map_vector(V{}, [](float) { return NAN; });
        return;
      }
      V other;  // of the pair of each element, times what rotate_half multiplies it by
      const int away = at < size / 2 ? size / 2 : -size / 2;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int partner = p.interleaved ? (at + e) ^ 1 : at + e + away;
        const bool is_first = p.interleaved ? partner > at + e : away > 0;
        const float element = to_float(s_row[partner]);
        other.value[e] = from_float<T>(is_first ? -element : element);
      }
      value = rounded_sum_of_products(value, *reinterpret_cast<const V*>(cos + at), 1.0f, other,
                                      *reinterpret_cast<const V*>(sin + at));
    });
  }

  __device__ void append() {
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0 || slot >= p.num_blocks * p.page_size) return;
    const int kv_head = (head - static_cast<int>(p.num_heads_q)) % static_cast<int>(p.num_heads_kv);
    const int which = head >= p.num_heads_q + p.num_heads_kv;
    const CachePlane& plane = p.planes[which];
    char* slot_row = static_cast<char*>(plane.cache) +
                     slot / p.page_size * plane.block_stride_bytes +
                     slot % p.page_size * plane.slot_stride_bytes;
    if (is_8_bit_cache(p.stored)) {
      append_8_bit(slot, kv_head, which,
                   reinterpret_cast<uint8_t*>(slot_row) + kv_head * p.head_dim);
      return;
    }
    T* to = reinterpret_cast<T*>(slot_row) + kv_head * p.head_dim;
    for_each([&](int at, V& value) { *reinterpret_cast<V*>(to + at) = value; });
  }

  __device__ void append_8_bit(int64_t slot, int kv_head, int which, uint8_t* to) {
    float largest = 0.0f;
    bool is_finite = true;
    for_each([&](int, const V& value) {
#pragma unroll
      for (const T element : value.value) {
        is_finite &= isfinite(to_float(element));
        largest = fmaxf(largest, fabsf(to_float(element)));
      }
    });
    const float factor =
        factor_of_row(p.scales[which], p.page_size, slot, kv_head, p.stored, largest, is_finite);
    for_each([&](int at, const V& value) {
      Vector<uint8_t, kElements> bytes;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        bytes.value[e] = stored_in_8_bits(to_float(value.value[e]) * factor, p.stored);
      }
      *reinterpret_cast<Vector<uint8_t, kElements>*>(to + at) = bytes;
    });
  }
};

template <typename T, int kElements, int kNumWarps>
__global__ void __launch_bounds__(kNumWarps* kWarpSize)
    rope_append_kv_kernel(const __grid_constant__ RopeAppendKvParams p) {
  __shared__ alignas(16) T s_rows[kNumWarps][kMaxRopeHeadDim];
  let_successors_start();
  wait_for_predecessors();
  const int warp = threadIdx.x / kWarpSize;
  const auto num_heads = static_cast<int>(p.num_heads_q + 2 * p.num_heads_kv);
  const int64_t item = int64_t{blockIdx.x} * kNumWarps + warp;
  if (item >= p.num_tokens * num_heads) return;
  RopeAppend<T, kElements, kNumWarps>(p, item / num_heads, static_cast<int>(item % num_heads))
      .run(s_rows[warp]);
}

}  // namespace llamatelemetry
