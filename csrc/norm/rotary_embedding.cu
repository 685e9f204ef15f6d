#include "norm/rotary_embedding.cuh"

namespace llamatelemetry {

Error launch_rotary_embedding(const RotaryEmbeddingParams& p, Stream stream) {
  constexpr int kNumThreads = 256;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    rotary_embedding_kernel<T, kNumThreads>
        <<<static_cast<unsigned>(p.num_tokens), kNumThreads, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
