// A tile times a panel of many tokens, for levels of few registers: those hold the codes of a
// sub-block of kLanes rows, decoded once, while all tokens of the panel pass by; sums and
// activations are in the first cache. The numbers are those of sum_quantized, bit for bit.
#pragma once

#include "gemm/quant_activations_cpu.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

template <typename Block>
LT_INLINE TileScales side_of(const QuantLinearParams& p, int64_t tile, int64_t block) {
  if constexpr (Block::kHasGroups) return scales_of(p.groups, tile, block);
  return {};
}

// How far ahead of a sub-block the weights are asked for: few tokens wait for memory, and above all
// for page walks, since the CPU's own prefetching ends with each page. Many tokens need less, and
// blocks of a code a byte are read so fast that more would be under way than the CPU keeps
// (benchmarks/notes/gemm.md).
template <typename Block, bool kFew>
constexpr int kBytesAhead = !kFew || is_byte(Block::kCodes) ? 4096 : 12288;

// Asks for what lies kBytesAhead behind a sub-block of a block. Blocks of many sub-blocks are read
// back and forth, scales at their end first, so the hardware prefetcher does not follow them: for
// few tokens a load of each line of the next block, in order, makes them a stream. The empty
// statement keeps the lines of a sub-block beside its products: GCC would ask for all of a block's
// at once, which leaves nothing of the gain for Q6_K at AVX2.
template <typename Block, bool kFew>
LT_INLINE void fetch_ahead(const uint8_t* block, int sub_block, const uint8_t* next) {
  constexpr int kLineBytes = 64, kBytes = Block::kBytes / Block::kSubBlocks;
  if constexpr (kFew) __asm__ volatile("" : "+r"(block), "+r"(next));
#pragma GCC unroll 16
  for (int line = 0; line < kBytes; line += kLineBytes) {
    const int offset = sub_block * kBytes + line;
    __builtin_prefetch(block + offset + kBytesAhead<Block, kFew>, 0, 2);
    if constexpr (kFew && Block::kSubBlocks > 1) {
      static_cast<void>(*static_cast<const volatile uint8_t*>(next + offset));  // read by nothing
    }
  }
}

// Whether a dot product starts with what the zero point takes from it.
template <typename Block>
constexpr bool kHasStart = Block::kZeroPoint != kDotSubtracts<Block::kLargestCode>;

// Codes of at most 7 bits.
template <int kFormat>
LT_INLINE void add_products(const PackedBlock<kFormat>& block, int sub_block,
                            const Words (&code)[kGroups], const ActivationBlock* x, int num_tokens,
                            Floats* sum) {
  using Block = PackedBlock<kFormat>;
  constexpr int kScales = Block::kScalesPerSubBlock;
  constexpr int kCount = kGroups / kScales;
  for (int i = 0; i < kParts; ++i) {
    WordPart codes[kScales][kCount];
    Vec scale[kScales], min[kScales];
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) codes[g / kCount][g % kCount] = code[g].v[i];
#pragma GCC unroll 2
    for (int s = 0; s < kScales; ++s) {
      scale[s] = block.scale(sub_block, s).v[i];
      if constexpr (Block::kHasMin) min[s] = block.min(sub_block, s).v[i];
    }
    for (int t = 0; t < num_tokens; ++t) {
      Vec term = vec_set(0.0f);
      if constexpr (Block::kHasMin && kScales == 2) {
        term = min[0] * vec_set(static_cast<float>(x[t].start[0]));
        term = vec_fma(min[1], vec_set(static_cast<float>(x[t].start[1])), term);
      } else if constexpr (Block::kHasMin) {
        term = min[0] * vec_set(x[t].sum);
      }
#pragma GCC unroll 2
      for (int s = 0; s < kScales; ++s) {
        const WordPart start = part_set(kHasStart<Block> ? x[t].start[s] : 0);
        const WordPart dots =
            dots_part<Block::kLargestCode>(start, codes[s], x[t].q + 4 * s * kCount);
        const Vec value = part_to_float(dots);
        term = s > 0 || Block::kHasMin ? vec_fma(scale[s], value, term) : scale[s] * value;
      }
      sum[t].v[i] = vec_fma(term, vec_set(x[t].scale), sum[t].v[i]);
    }
  }
}

#if defined(LT_ISA_AVX2)
// Codes of 8 bits, as pairs of 16: half a sub-block has as many as there are registers for, so
// that its products wait in memory for those of the other half.
template <int kFormat>
LT_INLINE void add_products(const PackedBlock<kFormat>& block, int sub_block,
                            const Words (&code)[kGroups], const WideActivationBlock* x,
                            int num_tokens, Floats* sum) {
  using Block = PackedBlock<kFormat>;
  static_assert(Block::kScalesPerSubBlock == 1 && !Block::kHasMin && !kHasStart<Block>);
  constexpr int kHalf = kGroups / 2;
  WordPart first_dots[kChunkTokens];
  for (int i = 0; i < kParts; ++i) {
    const Vec scale = block.scale(sub_block, 0).v[i];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      WordPart pairs[2 * kHalf];
#pragma GCC unroll 4
      for (int g = 0; g < kHalf; ++g) {
        const WordPart codes =
            _mm256_xor_si256(code[half * kHalf + g].v[i], _mm256_set1_epi8(-128));
        pairs[2 * g] = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8);
        pairs[2 * g + 1] = _mm256_srai_epi16(codes, 8);
      }
      for (int t = 0; t < num_tokens; ++t) {
        WordPart dots = half == 0 ? _mm256_setzero_si256() : first_dots[t];
#pragma GCC unroll 8
        for (int j = 0; j < 2 * kHalf; ++j) {
          int32_t two;
          std::memcpy(&two, x[t].q + half * kSubBlock / 2 + 2 * j, sizeof two);
          dots = _mm256_add_epi32(dots, _mm256_madd_epi16(pairs[j], _mm256_set1_epi32(two)));
        }
        if (half == 0) {
          first_dots[t] = dots;
        } else {
          const Vec term = scale * part_to_float(dots);
          sum[t].v[i] = vec_fma(term, vec_set(x[t].scale), sum[t].v[i]);
        }
      }
    }
  }
}
#endif

template <int kFormat>
LT_INLINE void sum_many(const QuantLinearParams& p, int64_t tile_index, const Panel& panel,
                        Floats* sum) {
  using Block = PackedBlock<kFormat>;
  using Activations = std::conditional_t<takes_wide_blocks<Block>({0, 0, true}),
                                         WideActivationBlock, ActivationBlock>;
  const int64_t num_blocks = p.k / Block::kLayout.block_size;
  const uint8_t* tile = p.packed + tile_index * num_blocks * Block::kBytes;
  const auto* x = blocks_of<Activations>(p, panel);
  for (int64_t i = 0; i < num_blocks; ++i, tile += Block::kBytes) {
    const Block block(tile, side_of<Block>(p, tile_index, i));
    for (int sub_block = 0; sub_block < Block::kSubBlocks; ++sub_block, x += panel.size) {
      fetch_ahead<Block, false>(tile, sub_block, tile);
      Words code[kGroups];
      block.codes(sub_block, code);
      add_products<kFormat>(block, sub_block, code, x, panel.size, sum);
    }
  }
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
