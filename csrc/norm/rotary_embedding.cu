#include "norm/rotary_embedding.cuh"

namespace llamatelemetry {
namespace {

constexpr int kNumThreads = 128;

template <typename V>
void start(const RotaryEmbeddingParams& p, Stream stream) {
  const int64_t units = (p.q.num_heads + p.k.num_heads) * (p.rotary_dim / 2 / V::kElements);
  const dim3 grid(static_cast<unsigned>(p.num_tokens),
                  static_cast<unsigned>((units + kNumThreads - 1) / kNumThreads));
  launch_overlapped(rotary_embedding_kernel<V, kNumThreads>, grid, kNumThreads, stream, p);
}

}  // namespace

Error launch_rotary_embedding(const RotaryEmbeddingParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    // Interleaved pairs lie within a vector: they are turned one by one.
    const bool wide =
        !p.interleaved && fits_wide_vectors<T>({p.q.x, p.k.x, p.cos, p.sin}, p.rotary_dim / 2,
                                               p.q.token_stride, p.q.head_stride, p.k.token_stride,
                                               p.k.head_stride, p.cos_row_stride, p.sin_row_stride);
    if (wide) {
      start<WideVector<T>>(p, stream);
    } else {
      start<Vector<T, 1>>(p, stream);
    }
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
