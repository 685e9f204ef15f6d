// Of each token's packed q, k and v the optional norm of each head of q and k, the rotary embedding
// of both in place, and the cache write of k and v. Rounds where rms_norm, rotary_embedding_ and
// append_kv_ would. Memory bound. One item per token: its row of cos and sin serves every head.
#include <cstring>
#include <type_traits>

#include "cache/eight_bit.h"
#include "cache/params.h"
#include "cache/sixteen_bit.h"
#include "cpu/parallel.h"
#include "vec/row_ops.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename T>
void rope_append_tokens(const RopeAppendKvParams& p, int64_t begin, int64_t end) {
  const int64_t stored_bytes = p.head_dim * dtype_bytes(p.stored);  // of a head in the cache
  for (int64_t token = begin; token < end; ++token) {
    int64_t position = token;
    if (p.positions) {
      position = p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[token]
                                       : static_cast<const int32_t*>(p.positions)[token];
    }
    const bool known = position >= 0 && position < p.num_positions;
    const T* cos = known ? static_cast<const T*>(p.cos) + position * p.cos_row_stride : nullptr;
    const T* sin = known ? static_cast<const T*>(p.sin) + position * p.sin_row_stride : nullptr;
    T* heads = static_cast<T*>(p.qkv) + token * p.token_stride;
    for (int64_t head = 0; head < p.num_heads_q + p.num_heads_kv; ++head) {
      T* x = heads + head * p.head_stride;
      const auto* weight = static_cast<const T*>(head < p.num_heads_q ? p.q_weight : p.k_weight);
      if (weight != nullptr) rms_norm_row(x, weight, p.head_dim, p.eps, p.weight_offset, x);
      rotate_row(x, cos, sin, p.rotary_dim, p.interleaved);
    }
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0 || slot >= p.num_blocks * p.page_size) continue;
    const T* source = heads + p.num_heads_q * p.head_stride;
    for (int which = 0; which < 2; ++which) {
      const CachePlane& plane = p.planes[which];
      char* row = static_cast<char*>(plane.cache) + slot / p.page_size * plane.block_stride_bytes +
                  slot % p.page_size * plane.slot_stride_bytes;
      for (int64_t head = 0; head < p.num_heads_kv; ++head, source += p.head_stride) {
        char* to = row + head * stored_bytes;
        if (p.stored == p.dtype) {
          std::memcpy(to, source, static_cast<size_t>(stored_bytes));
        } else if (is_8_bit_cache(p.stored)) {
          store_row_in_8_bits(source, p.head_dim, p.stored, p.scales[which], p.page_size, slot,
                              head, reinterpret_cast<uint8_t*>(to));
        } else if constexpr (std::is_same_v<T, float>) {
          store_row_in_16_bits(source, p.head_dim, p.stored, to);
        }
      }
    }
  }
}

void rope_append_items(const RopeAppendKvParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    rope_append_tokens<typename decltype(type)::type>(p, begin, end);
  });
}

}  // namespace

Error launch_rope_append_kv(const RopeAppendKvParams& params, Stream) {
  if (params.stored != params.dtype && !is_8_bit_cache(params.stored) &&
      !is_16_bit_cache(kOnCuda, params.dtype, params.stored)) {
    return kNotConverted;
  }
  const auto num_values =
      static_cast<double>((params.num_heads_q + 2 * params.num_heads_kv) * params.head_dim);
  parallel_over<rope_append_items>("rope_append_kv_",
                                   Work{params.num_tokens, 20.0 + 0.3 * num_values}, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_rope_append_kv, RopeAppendKvParams)
