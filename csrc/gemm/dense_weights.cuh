// weights[n, k] = the packed weights in T: what a dense matmul reads where x has many rows.
// Bound by writing. A thread decodes one word of four rows; a warp writes whole sectors of each.
// Grid [blocks that hold num_threads], block kNumThreads.
#pragma once

#include <cstdint>

#include "format/decode.cuh"
#include "gemm/params.h"
#include "tile/vector.cuh"

namespace llamatelemetry {

template <int kFormat, typename T, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    dense_weights_kernel(const uint8_t* __restrict__ packed,  // [ceil(n / 16), 16 * row_bytes]
                         GroupScales groups,       // of formats with scales beside their blocks
                         T* __restrict__ weights,  // [n, k]
                         int64_t n, int64_t k,
                         int64_t num_threads) {  // ceil(n / 16) * words of a row * 4
  constexpr int kQuad = 4;                       // rows in a thread
  using Word = PackedWord<kFormat, kQuad>;
  constexpr int kThreadsPerBlock = Word::kWordsPerBlock * (kTileRows / kQuad);  // packed block
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kNumThreads + threadIdx.x;
  if (thread >= num_threads) return;
  const int first_in_tile = kQuad * static_cast<int>(thread % (kTileRows / kQuad));
  const int word = static_cast<int>(thread % kThreadsPerBlock) / (kTileRows / kQuad);
  const int64_t packed_block = thread / kThreadsPerBlock;  // counted through all tiles
  const int64_t blocks_per_row = k / Word::kBlockSize;
  const int64_t tile = packed_block / blocks_per_row;
  const int64_t block = packed_block - tile * blocks_per_row;

  TileScales side{};
  if constexpr (Word::kHasGroups) side = scales_of(groups, tile, block);
  const Word decoder(packed + packed_block * Word::kPackedBytes, word, first_in_tile, side);
#pragma unroll
  for (int r = 0; r < kQuad; ++r) {
    const int64_t row = tile * kTileRows + first_in_tile + r;
    if (row >= n) return;
    T* block_of_row = weights + row * k + block * Word::kBlockSize;
#pragma unroll
    for (int part = 0; part < Word::kParts; ++part) {
      if (part >= Word::num_parts(word)) break;
      float values[4];
      decoder.decode(part, r, values);
      store_four(block_of_row + Word::first_weight(word, part), values);
    }
  }
}

// Launches for the formats of a set.
template <FormatSet kSet>
Error launch_dense_weights_of(const DenseWeightsParams& p, Stream stream) {
  constexpr int kNumThreads = 256;
  dispatch_format<kSet>(p.format, [&](auto format) {
    dispatch_dtype(p.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      using Word = PackedWord<format(), 4>;
      const int64_t num_tiles = (p.n + kTileRows - 1) / kTileRows;
      const int64_t num_threads = num_tiles * (p.k / Word::kBlockSize) * Word::kWordsPerBlock * 4;
      const auto grid = static_cast<unsigned>((num_threads + kNumThreads - 1) / kNumThreads);
      dense_weights_kernel<format(), T, kNumThreads><<<grid, kNumThreads, 0, stream>>>(
          p.packed, p.groups, static_cast<T*>(p.weights), p.n, p.k, num_threads);
    });
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
