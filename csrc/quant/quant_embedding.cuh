// out[i, :] = W[ids[i], :] of packed W [n, k]; zeros for an id outside [0, n).
// Bandwidth bound, 4 useful bytes of each 32-byte sector. A thread decodes one word of one row.
// Grid [blocks that hold a thread per id and word], block kNumThreads.
#pragma once

#include <cstdint>

#include "format/decode.cuh"
#include "quant/params.h"
#include "tile/vector.cuh"

namespace llamatelemetry {

template <int kFormat, typename T, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    quant_embedding_kernel(const QuantEmbeddingParams p) {
  using Word = PackedWord<kFormat, 1>;
  const int64_t blocks_per_row = p.k / Word::kBlockSize;
  const int64_t words_per_row = blocks_per_row * Word::kWordsPerBlock;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kNumThreads + threadIdx.x;
  const int64_t i = thread / words_per_row;
  if (i >= p.num_ids) return;
  const int64_t block = (thread - i * words_per_row) / Word::kWordsPerBlock;
  const int word = static_cast<int>(thread % Word::kWordsPerBlock);
  T* out = static_cast<T*>(p.out) + i * p.k + block * Word::kBlockSize;

  const int64_t id = p.ids_are_int64 ? static_cast<const int64_t*>(p.ids)[i]
                                     : static_cast<const int32_t*>(p.ids)[i];
  if (id < 0 || id >= p.n) {
    const float zeros[4] = {};
#pragma unroll
    for (int part = 0; part < Word::kParts; ++part) {
      if (part >= Word::num_parts(word)) break;
      store_four(out + Word::first_weight(word, part), zeros);
    }
    return;
  }
  const int64_t packed_block = id / kTileRows * blocks_per_row + block;
  const Word decoder(p.packed + packed_block * Word::kPackedBytes, word,
                     static_cast<int>(id % kTileRows));
#pragma unroll
  for (int part = 0; part < Word::kParts; ++part) {
    if (part >= Word::num_parts(word)) break;
    float weights[4];
    decoder.decode(part, 0, weights);
    store_four(out + Word::first_weight(word, part), weights);
  }
}

// Launches for the formats of a set.
template <FormatSet kSet>
Error launch_quant_embedding_of(const QuantEmbeddingParams& p, Stream stream) {
  constexpr int kNumThreads = 128;
  dispatch_format<kSet>(p.format, [&](auto format) {
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
