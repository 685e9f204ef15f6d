// out[i] = (d * scale) * code[i] - m * minimum, from GGUF blocks in place (format/gguf.h).
// Bound by decoding the codes; one item per block. Computed in float, rounded once to T.
#include "cpu/parallel.h"
#include "format/gguf.h"
#include "quant/params.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename Format, typename T>
void dequantize_block(const uint8_t* block, T* out) {
#pragma GCC unroll 16
  for (int run = 0; run < Format::kWeights / kRun; ++run) {
    const RunScale s = Format::scale(block, run);
    const float d = Format::kHasExponent ? exponent_to_float(s.d) : to_float(Half{s.d});
    const Vec scale = vec_set(d * static_cast<float>(s.scale));
    const Vec minus = vec_set(-(to_float(Half{s.m}) * static_cast<float>(s.minimum)));
    float code[kRun];
    for (int i = 0; i < kRun; ++i) code[i] = static_cast<float>(Format::code(block, run, i));
    for (int i = 0; i < kRun; i += Vec::kLanes) {
      const Vec value = vec_load(code + i);
      // Without a minimum a plain product: adding 0 would turn -0 into 0.
      vec_store(out + kRun * run + i,
                Format::kHasMinimum ? vec_fma(value, scale, minus) : value * scale);
    }
  }
}

template <typename Format, typename T>
void dequantize_blocks(const DequantizeParams& p, int64_t begin, int64_t end) {
  int64_t row = begin / p.blocks_per_row;
  int64_t column = begin % p.blocks_per_row;
  for (int64_t i = begin; i < end; ++i) {
    dequantize_block<Format>(p.data + row * p.row_stride_bytes + column * Format::kBytes,
                             static_cast<T*>(p.out) + i * Format::kWeights);
    if (++column == p.blocks_per_row) column = 0, ++row;
  }
}

void dequantize_items(const DequantizeParams& p, int64_t begin, int64_t end) {
  dispatch_format<FormatSet::kBlocks>(p.format, [&](auto format) {
    dispatch_dtype(p.dtype, [&](auto type) {
      dequantize_blocks<Block<format()>, typename decltype(type)::type>(p, begin, end);
    });
  });
}

}  // namespace

Error launch_dequantize(const DequantizeParams& params, Stream) {
  const int block_size = kFormats[params.format].fields.block_size;
  const double item_ns = 0.24 * block_size;
  const Work work{params.num_rows * params.blocks_per_row, item_ns};
  parallel_over<dequantize_items>("dequantize", work, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_dequantize, DequantizeParams)
