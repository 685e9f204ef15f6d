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
// it: tokens go in panels, which meet a block of W when it has been decoded once. The sums of up to
// kMaxPanel tokens stay in registers; those of more are in memory where AVX2 leaves no registers
// for them (quant_linear_many_cpu.h). A panel's size does not change a bit of its rows.
#pragma once

#include "gemm/quant_linear_many_cpu.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

// ---- linear: one item per tile and chunk of tokens

// One token takes as long as its decoding, which is shorter where it is known at which bits a
// sub-block lies. (At the scalar level the compiler would take minutes.)
#if defined(LT_ISA_SCALAR)
constexpr bool kUnrollSubBlocks = false;
#else
constexpr bool kUnrollSubBlocks = true;
#endif

template <int kFormat, int kTokens>
LT_INLINE void add_sub_block(const PackedBlock<kFormat>& block, int sub_block,
                             const ActivationBlock* x, Floats (&sum)[kTokens]) {
  using Block = PackedBlock<kFormat>;
  constexpr int kGroupsPerScale = kGroups / Block::kScalesPerSubBlock;
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
      Words dots = words_set(kHasStart<Block> ? x[t].start[s] : 0);
      dots = dots_of<Block::kLargestCode, kGroupsPerScale>(dots, code + s * kGroupsPerScale,
                                                           x[t].q + 4 * s * kGroupsPerScale);
      const Floats scale = block.scale(sub_block, s);
      const Floats value = words_to_float(dots);
      term = s > 0 || Block::kHasMin ? floats_fma(scale, value, term) : scale * value;
    }
    sum[t] = floats_fma(term, floats_set(x[t].scale), sum[t]);
  }
}

// The block behind this one, or this one where it is the last of all.
template <typename Block>
LT_INLINE const uint8_t* next_block(const QuantLinearParams& p, const uint8_t* block) {
  const int64_t num_tiles = (p.n + kTileRows - 1) / kTileRows;
  const int64_t num_blocks = num_tiles * (p.k / Block::kLayout.block_size);
  const bool is_last = block + Block::kBytes == p.packed + num_blocks * Block::kBytes;
  return is_last ? block : block + Block::kBytes;
}

template <int kFormat, int kTokens>
LT_INLINE void sum_quantized(const QuantLinearParams& p, int64_t tile_index, const uint8_t* tile,
                             int64_t num_blocks, const ActivationBlock* x, Floats (&sum)[kTokens]) {
  using Block = PackedBlock<kFormat>;
  constexpr bool kFew = kTokens <= 4;  // they wait for memory, more for their products
  for (int64_t i = 0; i < num_blocks; ++i, tile += Block::kBytes) {
    const Block block(tile, side_of<Block>(p, tile_index, i));
    const uint8_t* next = next_block<Block>(p, tile);
    if constexpr (kTokens <= 2 && kUnrollSubBlocks) {
#pragma GCC unroll 8
      for (int sub_block = 0; sub_block < Block::kSubBlocks; ++sub_block, x += kTokens) {
        fetch_ahead<Block, kFew>(tile, sub_block, next);
        add_sub_block(block, sub_block, x, sum);
      }
    } else {
      for (int sub_block = 0; sub_block < Block::kSubBlocks; ++sub_block, x += kTokens) {
        fetch_ahead<Block, kFew>(tile, sub_block, next);
        add_sub_block(block, sub_block, x, sum);
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
template <typename T>
void store_panel(const QuantLinearParams& p, int64_t row, const Panel& panel, const Floats* sum) {
  const int num_rows = static_cast<int>(p.n - row < kTileRows ? p.n - row : kTileRows);
  float bias[kTileRows] = {};
  for (int i = 0; p.bias != nullptr && i < num_rows; ++i) {
    bias[i] = to_float(static_cast<const T*>(p.bias)[row + i]);
  }
  for (int t = 0; t < panel.size; ++t) {
    T* out = static_cast<T*>(p.out) + (panel.first + t) * p.n + row;
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

void store(const QuantLinearParams& p, int64_t tile, const Panel& panel, const Floats* sum) {
  dispatch_dtype(p.dtype, [&](auto type) {
    store_panel<typename decltype(type)::type>(p, tile * kTileRows, panel, sum);
  });
}

template <int kFormat, int kTokens>
__attribute__((noinline)) void linear_panel(const QuantLinearParams& p, int64_t tile,
                                            const Panel& panel) {
  const int64_t num_blocks = p.k / PackedBlock<kFormat>::kLayout.block_size;
  const uint8_t* packed = p.packed + tile * num_blocks * PackedBlock<kFormat>::kBytes;
  Floats sum[kTokens];
  for (int t = 0; t < kTokens; ++t) sum[t] = floats_set(0.0f);
  if (p.exact) {
    sum_exact<kFormat>(p, tile, packed, num_blocks,
                       static_cast<const float*>(p.workspace) + panel.first * p.k, sum);
  } else if constexpr (!is_floating(PackedBlock<kFormat>::kCodes)) {
    sum_quantized<kFormat>(p, tile, packed, num_blocks, blocks_of<ActivationBlock>(p, panel), sum);
  }
  // A copy, for sum to stay in registers: whatever the call reads is written to memory each time.
  Floats total[kTokens];
  for (int t = 0; t < kTokens; ++t) total[t] = sum[t];
  store(p, tile, panel, total);
}

template <int kFormat>
__attribute__((noinline)) void linear_many(const QuantLinearParams& p, int64_t tile,
                                           const Panel& panel) {
  Floats sum[kChunkTokens];
  for (int t = 0; t < panel.size; ++t) sum[t] = floats_set(0.0f);
  sum_many<kFormat>(p, tile, panel, sum);
  store(p, tile, panel, sum);
}

using PanelSizes = IntMenu<1, 2, 4, 8, 16>;

int64_t num_chunks(const QuantLinearParams& p) { return (p.m + kChunkTokens - 1) / kChunkTokens; }

template <int kFormat>
void linear_tiles(const QuantLinearParams& p, int64_t begin, int64_t end) {
  constexpr bool kTakesMany =
      many_tokens(kFormats[kFormat]) > 0 && !is_floating(kFormats[kFormat].codes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / num_chunks(p);
    int64_t token = item % num_chunks(p) * kChunkTokens;
    const int64_t stop = token + kChunkTokens < p.m ? token + kChunkTokens : p.m;
    while (token < stop) {
      const Panel panel = panel_from(token, p);
      token += panel.size;
      if constexpr (kTakesMany) {
        if (panel.many) {
          linear_many<kFormat>(p, tile, panel);
          continue;
        }
      }
      PanelSizes::dispatch(panel.size, [&](auto size) {
        if constexpr (size() <= kMaxPanel) linear_panel<kFormat, size()>(p, tile, panel);
      });
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
