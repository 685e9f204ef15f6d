// out[i] = (d * scale) * code[i] - m * minimum, from GGUF blocks in place (format/gguf.h).
// Bandwidth bound by what it writes: a thread decodes four consecutive weights and stores them as
// one word; neighbouring threads share the bytes of a block in L1.
// Grid [blocks that hold num_quads threads], block kNumThreads.
#pragma once

#include <cstdint>

#include "format/gguf.h"
#include "quant/params.h"
#include "tile/vector.cuh"

namespace llamatelemetry {

template <typename Format, typename T, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    dequantize_kernel(const uint8_t* __restrict__ data,  // rows row_stride_bytes apart
                      T* __restrict__ out,               // contiguous
                      int64_t num_quads,                 // weights / 4
                      int64_t quads_per_row, int64_t row_stride_bytes) {
  const int64_t quad = static_cast<int64_t>(blockIdx.x) * kNumThreads + threadIdx.x;
  if (quad >= num_quads) return;
  const int64_t row = quad / quads_per_row;
  const int64_t weight = (quad - row * quads_per_row) * 4;  // in its row
  const uint8_t* block = data + row * row_stride_bytes + weight / Format::kWeights * Format::kBytes;
  const int run = static_cast<int>(weight % Format::kWeights) / kRun;
  const int first = static_cast<int>(weight % kRun);

  const RunScale s = Format::scale(block, run);
  const float d = Format::kHasExponent ? exponent_to_float(s.d) : half_bits_to_float(s.d);
  const float scale = d * static_cast<float>(s.scale);
  const float minimum = half_bits_to_float(s.m) * static_cast<float>(s.minimum);
  float weights[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float product = scale * static_cast<float>(Format::code(block, run, first + i));
    weights[i] = Format::kHasMinimum ? product - minimum : product;
  }
  store_four(out + 4 * quad, weights);
}

// Launches for the formats of a set.
template <FormatSet kSet>
Error launch_dequantize_of(const DequantizeParams& p, Stream stream) {
  constexpr int kNumThreads = 256;
  dispatch_format<kSet>(p.format, [&](auto format) {
    dispatch_dtype(p.dtype, [&](auto type) {
      using Format = Block<format()>;
      using T = typename decltype(type)::type;
      const int64_t quads_per_row = p.blocks_per_row * Format::kWeights / 4;
      const int64_t num_quads = p.num_rows * quads_per_row;
      const auto grid = static_cast<unsigned>((num_quads + kNumThreads - 1) / kNumThreads);
      dequantize_kernel<Format, T, kNumThreads><<<grid, kNumThreads, 0, stream>>>(
          p.data, static_cast<T*>(p.out), num_quads, quads_per_row, p.row_stride_bytes);
    });
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
