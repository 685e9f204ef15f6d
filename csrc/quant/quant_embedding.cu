#include "quant/quant_embedding.cuh"

namespace llamatelemetry {

Error launch_quant_embedding(const QuantEmbeddingParams& p, Stream stream) {
  constexpr int kNumThreads = 128;
  dispatch_format(p.format, [&](auto format) {
    dispatch_dtype(p.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      using Word = PackedWord<format(), 1>;
      const int64_t threads = p.num_ids * (p.k / Word::kBlockSize) * Word::kWordsPerBlock;
      const auto grid = static_cast<unsigned>((threads + kNumThreads - 1) / kNumThreads);
      quant_embedding_kernel<format(), T, kNumThreads><<<grid, kNumThreads, 0, stream>>>(p);
    });
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
