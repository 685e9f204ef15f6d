#include "cache/rope_append_kv.cuh"

#include "tile/vector.cuh"

namespace llamatelemetry {
namespace {

constexpr int kNumWarps = 4;

template <typename T, int kElements>
void start(const RopeAppendKvParams& p, Stream stream) {
  const int64_t warps = p.num_tokens * (p.num_heads_q + 2 * p.num_heads_kv);
  const dim3 grid(static_cast<unsigned>((warps + kNumWarps - 1) / kNumWarps));
  launch_overlapped(rope_append_kv_kernel<T, kElements, kNumWarps>, grid, kNumWarps * kWarpSize,
                    stream, p);
}

// Whether every row that the kernel touches can be moved in units of kElements: their addresses,
// strides and sizes, and halves of a rotation.
template <typename T, int kElements>
bool fits(const RopeAppendKvParams& p) {
  auto elements = static_cast<uint64_t>(p.token_stride | p.head_stride | p.head_dim |
                                        p.rotary_dim / (p.interleaved ? 1 : 2) | p.cos_row_stride |
                                        p.sin_row_stride);
  uint64_t bytes = elements * sizeof(T);
  for (const void* pointer :
       {static_cast<const void*>(p.qkv), p.cos, p.sin, p.q_weight, p.k_weight}) {
    bytes |= reinterpret_cast<uint64_t>(pointer);
  }
  for (const CachePlane& plane : p.planes) {
    bytes |= reinterpret_cast<uint64_t>(plane.cache);
    bytes |= static_cast<uint64_t>(plane.block_stride_bytes | plane.slot_stride_bytes);
  }
  return bytes % (kElements * sizeof(T)) == 0;
}

}  // namespace

Error launch_rope_append_kv(const RopeAppendKvParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kElements = 4;  // 32 lanes of them are a head of 128
    if (fits<T, kElements>(p)) {
      start<T, kElements>(p, stream);
    } else {
      start<T, 1>(p, stream);
    }
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
