// The activations of quant_linear on the CPU: panels of tokens, and x in the form that their
// products take.
#pragma once

#include "cpu/parallel.h"
#include "format/decode_cpu.h"
#include "gemm/params.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr int64_t kChunkTokens = 64;  // an item: one tile and this many tokens
// Panels of these sizes keep their sums in registers.
#if defined(LT_ISA_AVX512)
constexpr int kMaxPanel = 16;  // 8 registers of codes, 16 of sums, 8 for the rest
#else
constexpr int kMaxPanel = 4;  // 16 registers in all
#endif
// From this many tokens on they go in panels of kChunkTokens or what is left, whose sums are in
// memory (gemm/quant_linear_many_cpu.h); at AVX2, and never where it is 0. Below, the small panels
// are faster, the longer the less there is to decode (benchmarks/notes/gemm.md).
static constexpr int64_t many_tokens(const FormatDescriptor& format) {
#if defined(LT_ISA_AVX2)
  if (has_scale_per_16(format.scale_rule)) return 2;
  if (format.fields.block_size > kSubBlock) return 4;
  return largest_code(format.codes) > 15 ? 5 : 12;
#else
  static_cast<void>(format);
  return 0;
#endif
}

// 32 activations in 8 bits. A panel of T tokens holds its blocks as [k / 32][T].
struct ActivationBlock {
  int8_t q[kSubBlock];
  float scale;
  float sum;  // Σ q, which a minimum multiplies
  // Over the q that share a weight scale: -zero_point · Σ q, where their dot starts; of formats
  // that have a minimum there, and no zero point, Σ q.
  int32_t start[2];
};

// Those of a panel of many tokens whose codes have 8 bits: q in pairs of 16, as madd takes them;
// of weights 4g .. 4g + 3 in the order 0, 2, 1, 3.
struct WideActivationBlock {
  int16_t q[kSubBlock];
  float scale;
};

// Panels: of a chunk of kChunkTokens as many of the largest size as there are, then powers of two.
struct Panel {
  int64_t first;
  int size;
  bool many;
};

Panel panel_from(int64_t first, const QuantLinearParams& p) {
  const int64_t left = p.m - first;
  const int64_t many = many_tokens(kFormats[p.format]);
  if (many > 0 && !p.exact && left >= many) {
    return {first, static_cast<int>(left < kChunkTokens ? left : kChunkTokens), true};
  }
  int size = kMaxPanel;
  while (size > left) size /= 2;
  return {first, size, false};
}

Panel panel_of(int64_t token, const QuantLinearParams& p) {
  Panel panel = panel_from(token / kChunkTokens * kChunkTokens, p);
  while (token >= panel.first + panel.size) panel = panel_from(panel.first + panel.size, p);
  return panel;
}

// What a token takes of the workspace for each of its blocks, whichever kind they are of.
constexpr int64_t activation_block_bytes(int format) {
  const bool may_be_wide = largest_code(kFormats[format].codes) > 127;
  return may_be_wide ? sizeof(WideActivationBlock) : sizeof(ActivationBlock);
}
static_assert(sizeof(WideActivationBlock) >= sizeof(ActivationBlock));

// The blocks of a panel.
template <typename Block>
Block* blocks_of(const QuantLinearParams& p, const Panel& panel) {
  const int64_t offset = panel.first * (p.k / kSubBlock) * activation_block_bytes(p.format);
  return reinterpret_cast<Block*>(static_cast<uint8_t*>(p.workspace) + offset);
}

// ---- prepare: one item per token

template <typename T>
void quantize_block(const T* x, ActivationBlock& block, int zero_point, bool two_scales) {
  constexpr int kVecs = kSubBlock / Vec::kLanes;
  Vec value[kVecs];
  Vec absmax = vec_set(0.0f);
  Vec poison = vec_set(0.0f);  // NaN if any value is NaN or infinite
  for (int i = 0; i < kVecs; ++i) {
    value[i] = vec_load(x + i * Vec::kLanes);
    absmax = vec_max(vec_max(value[i], vec_set(0.0f) - value[i]), absmax);
    poison = vec_fma(value[i], vec_set(0.0f), poison);
  }
  block.scale = vec_reduce_max(absmax) / 127.0f + vec_sum(poison);
  constexpr float kSmallestScale = 0x1p-126f;  // 1 / scale is finite from here on
  const bool usable = block.scale >= kSmallestScale;
  const Vec inverse = vec_set(usable ? 1.0f / block.scale : 0.0f);
  Vec sum[2] = {vec_set(0.0f), vec_set(0.0f)};
  for (int i = 0; i < kVecs; ++i) {
    const Vec q = usable ? vec_round(value[i] * inverse) : vec_set(0.0f);
    vec_store_int8(block.q + i * Vec::kLanes, q);
    Vec& half = sum[2 * i / kVecs];
    half = half + q;
  }
  const auto first = static_cast<int32_t>(vec_sum(sum[0]));
  const auto second = static_cast<int32_t>(vec_sum(sum[1]));
  block.sum = static_cast<float>(first + second);
  block.start[0] = -zero_point * (two_scales ? first : first + second);
  block.start[1] = -zero_point * second;
}

template <typename Block>
constexpr bool takes_wide_blocks(const Panel& panel) {
  return Block::kLargestCode > 127 && panel.many;
}

void widen_block(const ActivationBlock& block, WideActivationBlock& wide) {
  for (int first = 0; first < kSubBlock; first += 4) {
    wide.q[first] = block.q[first];
    wide.q[first + 1] = block.q[first + 2];
    wide.q[first + 2] = block.q[first + 1];
    wide.q[first + 3] = block.q[first + 3];
  }
  wide.scale = block.scale;
}

template <int kFormat, typename T>
void quantize_tokens(const QuantLinearParams& p, int64_t begin, int64_t end) {
  using Block = PackedBlock<kFormat>;
  constexpr bool kMinPer16 = Block::kHasMin && Block::kScalesPerSubBlock == 2;
  static_assert(!kMinPer16 || Block::kZeroPoint == 0);
  constexpr int kZeroPoint =
      kMinPer16 ? -1 : Block::kZeroPoint - kDotSubtracts<Block::kLargestCode>;
  const int64_t num_blocks = p.k / kSubBlock;
  for (int64_t token = begin; token < end; ++token) {
    const Panel panel = panel_of(token, p);
    const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
    const bool wide = takes_wide_blocks<Block>(panel);
    auto* blocks = blocks_of<ActivationBlock>(p, panel) + (token - panel.first);
    auto* wide_blocks = blocks_of<WideActivationBlock>(p, panel) + (token - panel.first);
    ActivationBlock narrow;
    for (int64_t i = 0; i < num_blocks; ++i) {
      ActivationBlock& block = wide ? narrow : blocks[i * panel.size];
      quantize_block(x + i * kSubBlock, block, kZeroPoint, Block::kScalesPerSubBlock == 2);
      if (wide) widen_block(block, wide_blocks[i * panel.size]);
    }
  }
}

// Exact: a panel of T tokens holds x as float [k][T].
template <typename T>
void widen_tokens(const QuantLinearParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const Panel panel = panel_of(token, p);
    float* widened = static_cast<float*>(p.workspace) + panel.first * p.k + (token - panel.first);
    const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
    for (int64_t i = 0; i < p.k; ++i) widened[i * panel.size] = to_float(x[i]);
  }
}

template <FormatSet kSet>
void prepare_items(const QuantLinearParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.exact) return widen_tokens<T>(p, begin, end);
    dispatch_format<kSet>(p.format,
                          [&](auto format) { quantize_tokens<format(), T>(p, begin, end); });
  });
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
