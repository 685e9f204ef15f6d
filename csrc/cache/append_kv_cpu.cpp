// cache[slot_mapping[t]] = source[t] for K and V. Memory bound. One item per token.
#include <cstring>

#include "cache/params.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

void append_kv_items(const AppendKvParams& p, int64_t begin, int64_t end) {
  const int64_t num_slots = p.num_blocks * p.page_size;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0 || slot >= num_slots) continue;
    for (const CachePlane& plane : p.planes) {
      const char* source =
          static_cast<const char*>(plane.source) + token * plane.token_stride_bytes;
      char* row = static_cast<char*>(plane.cache) + slot / p.page_size * plane.block_stride_bytes +
                  slot % p.page_size * plane.slot_stride_bytes;
      for (int64_t head = 0; head < p.num_heads; ++head) {
        std::memcpy(row + head * p.head_bytes, source + head * plane.head_stride_bytes,
                    p.head_bytes);
      }
    }
  }
}

}  // namespace

Error launch_append_kv(const AppendKvParams& params, Stream) {
  const auto bytes = static_cast<double>(2 * params.num_heads * params.head_bytes);
  parallel_over<append_kv_items>("append_kv_", Work{params.num_tokens, 20.0 + 0.1 * bytes}, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_append_kv, AppendKvParams)
