// out[t, :] = x[t, :] · Wᵀ + bias for packed W [n, k].
//
// Two launches: prepare rewrites x once, linear runs over tiles of 16 weight rows. A row of out
// does not depend on the other rows, nor on how many there are: every sum runs over k in one order.
//
// Default: x becomes int8 in blocks of 32, q = round(x / scale), scale = absmax / 127, and
//
//   out = Σ_blocks  x_scale (w_scale Σ (code - zero_point) q  +  w_min Σ q)
//
// with the inner sums exact in int32. Exact: x in float, weights decoded to float.
//
// One token is bound by reading W, once and in order. From a few tokens on the dot products bound
// it: tokens go in panels of kMaxPanel, whose sums stay in registers while a block of W, decoded
// once, meets all tokens of the panel.
#pragma once

#include "cpu/parallel.h"
#include "format/decode_cpu.h"
#include "gemm/params.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

#if defined(LT_ISA_AVX512)
constexpr int kMaxPanel = 16;  // 8 registers of codes, 16 of sums, 8 for the rest
#else
constexpr int kMaxPanel = 4;  // 16 registers in all
#endif
constexpr int64_t kChunkTokens = 64;  // an item: one tile and this many tokens

// 32 activations in 8 bits. A panel of T tokens holds its blocks as [k / 32][T].
struct ActivationBlock {
  int8_t q[kSubBlock];
  float scale;
  float sum;  // Σ q, which a minimum multiplies
  // Over the q that share a weight scale: -zero_point · Σ q, where their dot starts; of formats
  // that have a minimum there, and no zero point, Σ q.
  int32_t start[2];
};

// Panels: as many of kMaxPanel tokens as there are, then powers of two.
struct Panel {
  int64_t first;
  int size;
};

Panel panel_from(int64_t first, int64_t num_tokens) {
  int size = kMaxPanel;
  while (first + size > num_tokens) size /= 2;
  return {first, size};
}

Panel panel_of(int64_t token, int64_t num_tokens) {
  Panel panel = panel_from(token / kMaxPanel * kMaxPanel, num_tokens);
  while (token >= panel.first + panel.size) {
    panel = panel_from(panel.first + panel.size, num_tokens);
  }
  return panel;
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

template <int kFormat, typename T>
void quantize_tokens(const QuantLinearParams& p, int64_t begin, int64_t end) {
  using Block = PackedBlock<kFormat>;
  constexpr bool kMinPer16 = Block::kHasMin && Block::kScalesPerSubBlock == 2;
  static_assert(!kMinPer16 || Block::kZeroPoint == 0);
  constexpr int kZeroPoint = kMinPer16 ? -1 : Block::kZeroPoint - kDotSubtracts<Block::kCodeBits>;
  const int64_t num_blocks = p.k / kSubBlock;
  for (int64_t token = begin; token < end; ++token) {
    const Panel panel = panel_of(token, p.m);
    auto* block = static_cast<ActivationBlock*>(p.workspace) + panel.first * num_blocks +
                  (token - panel.first);
    const T* x = static_cast<const T*>(p.x) + token * p.x_row_stride;
    for (int64_t i = 0; i < num_blocks; ++i) {
      quantize_block(x + i * kSubBlock, block[i * panel.size], kZeroPoint,
                     Block::kScalesPerSubBlock == 2);
    }
  }
}

// Exact: a panel of T tokens holds x as float [k][T].
template <typename T>
void widen_tokens(const QuantLinearParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const Panel panel = panel_of(token, p.m);
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

// ---- linear: one item per tile and chunk of tokens

template <typename Block>
LT_INLINE TileScales side_of(const QuantLinearParams& p, int64_t tile, int64_t block) {
  if constexpr (Block::kHasGroups) return scales_of(p.groups, tile, block);
  return {};
}

template <int kFormat, int kTokens>
LT_INLINE void sum_quantized(const QuantLinearParams& p, int64_t tile_index, const uint8_t* tile,
                             int64_t num_blocks, const ActivationBlock* x, Floats (&sum)[kTokens]) {
  using Block = PackedBlock<kFormat>;
  constexpr int kGroupsPerScale = kGroups / Block::kScalesPerSubBlock;
  for (int64_t i = 0; i < num_blocks; ++i, tile += Block::kBytes) {
    const Block block(tile, side_of<Block>(p, tile_index, i));
    for (int sub_block = 0; sub_block < Block::kSubBlocks; ++sub_block, x += kTokens) {
      Words code[kGroups];
      block.codes(sub_block, code);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        Floats term = floats_set(0.0f);
        if constexpr (Block::kHasMin && Block::kScalesPerSubBlock == 2) {
          const auto first = static_cast<float>(x[t].start[0]);
          const auto second = static_cast<float>(x[t].start[1]);
          term = block.min(sub_block, 0) * floats_set(first);
          term = floats_fma(block.min(sub_block, 1), floats_set(second), term);
        } else if constexpr (Block::kHasMin) {
          term = block.min(sub_block, 0) * floats_set(x[t].sum);
        }
#pragma GCC unroll 2
        for (int s = 0; s < Block::kScalesPerSubBlock; ++s) {
          Words dots = words_set(Block::kZeroPoint == 0 ? 0 : x[t].start[s]);
#pragma GCC unroll 8
          for (int g = s * kGroupsPerScale; g < (s + 1) * kGroupsPerScale; ++g) {
            int32_t quad;
            std::memcpy(&quad, x[t].q + 4 * g, sizeof quad);
            dots = dot<Block::kCodeBits>(dots, code[g], quad);
          }
          const Floats scale = block.scale(sub_block, s);
          const Floats value = words_to_float(dots);
          term = s > 0 || Block::kHasMin ? floats_fma(scale, value, term) : scale * value;
        }
        sum[t] = floats_fma(term, floats_set(x[t].scale), sum[t]);
      }
    }
  }
}

template <int kFormat, int kTokens>
LT_INLINE void sum_exact(const QuantLinearParams& p, int64_t tile_index, const uint8_t* tile,
                         int64_t num_blocks, const float* x, Floats (&sum)[kTokens]) {
  using Block = PackedBlock<kFormat>;
  for (int64_t i = 0; i < num_blocks; ++i, tile += Block::kBytes) {
    const Block block(tile, side_of<Block>(p, tile_index, i));
    for (int sub_block = 0; sub_block < Block::kSubBlocks; ++sub_block) {
      Floats weight[kSubBlock];
      block.weights(sub_block, weight);
      Floats partial[kTokens];  // short sums: less rounding, and no long chain of additions
      for (int t = 0; t < kTokens; ++t) partial[t] = floats_set(0.0f);
      for (int j = 0; j < kSubBlock; ++j, x += kTokens) {
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
          partial[t] = floats_fma(weight[j], floats_set(x[t]), partial[t]);
        }
      }
      for (int t = 0; t < kTokens; ++t) sum[t] = sum[t] + partial[t];
    }
  }
}

// Adds the bias, rounds and writes the rows of a tile that exist, for the tokens of a panel.
template <typename T, int kTokens>
void store_panel(const QuantLinearParams& p, int64_t row, int64_t token,
                 const Floats (&sum)[kTokens]) {
  const int num_rows = static_cast<int>(p.n - row < kTileRows ? p.n - row : kTileRows);
  float bias[kTileRows] = {};
  for (int i = 0; p.bias != nullptr && i < num_rows; ++i) {
    bias[i] = to_float(static_cast<const T*>(p.bias)[row + i]);
  }
  for (int t = 0; t < kTokens; ++t) {
    T* out = static_cast<T*>(p.out) + (token + t) * p.n + row;
    const Floats value = p.bias != nullptr ? sum[t] + floats_load(bias) : sum[t];
    if (num_rows == kTileRows) {
      floats_store(out, value);
    } else {
      float buffer[kTileRows];
      floats_store(buffer, value);
      for (int i = 0; i < num_rows; ++i) out[i] = from_float<T>(buffer[i]);
    }
  }
}

template <int kFormat, int kTokens>
__attribute__((noinline)) void linear_panel(const QuantLinearParams& p, int64_t tile,
                                            int64_t token) {
  const int64_t num_blocks = p.k / PackedBlock<kFormat>::kLayout.block_size;
  const uint8_t* packed = p.packed + tile * num_blocks * PackedBlock<kFormat>::kBytes;
  Floats sum[kTokens];
  for (int t = 0; t < kTokens; ++t) sum[t] = floats_set(0.0f);
  if (p.exact) {
    sum_exact<kFormat>(p, tile, packed, num_blocks,
                       static_cast<const float*>(p.workspace) + token * p.k, sum);
  } else if constexpr (!is_floating(PackedBlock<kFormat>::kCodes)) {
    sum_quantized<kFormat>(
        p, tile, packed, num_blocks,
        static_cast<const ActivationBlock*>(p.workspace) + token * (p.k / kSubBlock), sum);
  }
  dispatch_dtype(p.dtype, [&](auto type) {
    store_panel<typename decltype(type)::type>(p, tile * kTileRows, token, sum);
  });
}

using PanelSizes = IntMenu<1, 2, 4, 8, 16>;

int64_t num_chunks(const QuantLinearParams& p) { return (p.m + kChunkTokens - 1) / kChunkTokens; }

template <int kFormat>
void linear_tiles(const QuantLinearParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / num_chunks(p);
    int64_t token = item % num_chunks(p) * kChunkTokens;
    const int64_t stop = token + kChunkTokens < p.m ? token + kChunkTokens : p.m;
    while (token < stop) {
      const Panel panel = panel_from(token, p.m);
      PanelSizes::dispatch(panel.size, [&](auto size) {
        if constexpr (size() <= kMaxPanel) linear_panel<kFormat, size()>(p, tile, token);
      });
      token += panel.size;
    }
  }
}

template <FormatSet kSet>
void linear_items(const QuantLinearParams& p, int64_t begin, int64_t end) {
  dispatch_format<kSet>(p.format, [&](auto format) { linear_tiles<format()>(p, begin, end); });
}

// Launches for the formats of a set.
template <FormatSet kSet>
Error launch_quant_linear_of(const QuantLinearParams& p) {
  const auto k = static_cast<double>(p.k);
  parallel_over<prepare_items<kSet>>("quant_linear.prepare", {p.m, 20.0 + 0.15 * k}, p);
  const int64_t num_tiles = (p.n + kTileRows - 1) / kTileRows;
  const auto tokens = static_cast<double>(p.m < kChunkTokens ? p.m : kChunkTokens);
  const double item_ns = k * (p.exact ? 1.0 + tokens : 0.25 + 0.08 * tokens);
  parallel_over<linear_items<kSet>>("quant_linear", {num_tiles * num_chunks(p), item_ns}, p);
  return nullptr;
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
