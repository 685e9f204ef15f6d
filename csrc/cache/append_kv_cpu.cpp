// cache[slot_mapping[t]] = source[t] for K and V, as it is, float32 rounded to 16 bits, or in 8
// bits: round(source[t] / scale) for each head, in float8_e4m3 or int8. Memory bound. One item per
// token.
#include <cstring>

#include "cache/eight_bit.h"
#include "cache/params.h"
#include "cache/sixteen_bit.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

// Calls store(which, slot, head, source, row) for each head of each token that has a slot, K's
// (which = 0) and then V's.
template <typename Store>
void for_each_head(const AppendKvParams& p, int64_t begin, int64_t end, Store store) {
  const int64_t num_slots = p.num_blocks * p.page_size;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0 || slot >= num_slots) continue;
    for (int which = 0; which < 2; ++which) {
      const CachePlane& plane = p.planes[which];
      const char* source =
          static_cast<const char*>(plane.source) + token * plane.token_stride_bytes;
      char* row = static_cast<char*>(plane.cache) + slot / p.page_size * plane.block_stride_bytes +
                  slot % p.page_size * plane.slot_stride_bytes;
      for (int64_t head = 0; head < p.num_heads; ++head) {
        store(which, slot, head, source + head * plane.head_stride_bytes,
              row + head * p.head_bytes);
      }
    }
  }
}

void append_kv_items(const AppendKvParams& p, int64_t begin, int64_t end) {
  for_each_head(p, begin, end, [&](int, int64_t, int64_t, const char* source, char* row) {
    std::memcpy(row, source, p.head_bytes);
  });
}

void append_16_bit_items(const AppendKvParams& p, int64_t begin, int64_t end) {
  const int64_t head_dim = p.head_bytes / dtype_bytes(p.stored);
  for_each_head(p, begin, end, [&](int, int64_t, int64_t, const char* source, char* row) {
    store_row_in_16_bits(reinterpret_cast<const float*>(source), head_dim, p.stored, row);
  });
}

void append_8_bit_items(const AppendKvParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_head(p, begin, end,
                  [&](int which, int64_t slot, int64_t head, const char* source, char* row) {
                    store_row_in_8_bits(reinterpret_cast<const T*>(source), p.head_bytes, p.stored,
                                        p.scales[which], p.page_size, slot, head,
                                        reinterpret_cast<uint8_t*>(row));
                  });
  });
}

}  // namespace

Error launch_append_kv(const AppendKvParams& params, Stream) {
  const auto bytes = static_cast<double>(2 * params.num_heads * params.head_bytes);
  const Work work{params.num_tokens, 20.0 + 0.1 * bytes};
  if (params.stored == params.dtype) {
    parallel_over<append_kv_items>("append_kv_", work, params);
  } else if (is_16_bit_cache(kOnCuda, params.dtype, params.stored)) {
    parallel_over<append_16_bit_items>("append_kv_", work, params);
  } else {
    return kNotConverted;
  }
  return nullptr;
}

Error launch_append_8_bit(const AppendKvParams& params, Stream) {
  const auto values = static_cast<double>(2 * params.num_heads * params.head_bytes);
  parallel_over<append_8_bit_items>("append_kv_", Work{params.num_tokens, 20.0 + 2.0 * values},
                                    params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_append_kv, AppendKvParams)
LT_CPU_LAUNCHER(launch_append_8_bit, AppendKvParams)
