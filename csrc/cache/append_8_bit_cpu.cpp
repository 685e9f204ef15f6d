// cache[slot_mapping[t]] = round(source[t] / scale) for each head of K and V, in float8_e4m3 or
// int8. One item per token.
#include "cache/eight_bit.h"
#include "cache/params.h"
#include "cpu/parallel.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename T>
void append_tokens(const AppendKvParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0 || slot >= p.num_blocks * p.page_size) continue;
    for (int which = 0; which < 2; ++which) {
      const CachePlane& plane = p.planes[which];
      auto* row = static_cast<uint8_t*>(plane.cache) +
                  slot / p.page_size * plane.block_stride_bytes +
                  slot % p.page_size * plane.slot_stride_bytes;
      for (int64_t head = 0; head < p.num_heads; ++head) {
        const auto* source = static_cast<const char*>(plane.source) +
                             token * plane.token_stride_bytes + head * plane.head_stride_bytes;
        store_row_in_8_bits(reinterpret_cast<const T*>(source), p.head_bytes, p.stored,
                            p.scales[which], p.page_size, slot, head, row + head * p.head_bytes);
      }
    }
  }
}

void append_items(const AppendKvParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { append_tokens<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace

Error launch_append_8_bit(const AppendKvParams& params, Stream) {
  const auto values = static_cast<double>(2 * params.num_heads * params.head_bytes);
  parallel_over<append_items>("append_kv_", Work{params.num_tokens, 20.0 + 2.0 * values}, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_append_8_bit, AppendKvParams)
