// A fragments of wgmma from packed weights in shared memory, for quant_wgmma.cuh: 16 rows a warp,
// rows 2 * group and 2 * group + 1 of the tile as rows group and group + 8 of the fragment.
//
// Of 16 weights of each row, a lane has the 2 * t-th and the next of each half, t = lane % 4: half
// of the bytes of two packed words, picked by one permutation of bytes, so x lies in shared memory
// in its own order.
#pragma once

#include <cstdint>

#include "format/decode.cuh"
#include "ptx/nibbles.cuh"

namespace llamatelemetry {

using RunFragments = uint32_t[2][4];  // of a run of 32 weights: two steps of 16

// Four-bit codes as pairs of T, exactly: i = 0 and 2 are the low nibbles of bytes 0 and 2, and of 1
// and 3; i = 1 and 3 likewise the high ones. kBase is still to be subtracted.
template <typename T>
struct CodePairs;
template <>
struct CodePairs<BFloat16> {
  using Two = __nv_bfloat162;
  static constexpr int kBase = 128;
  static __device__ Two pair(uint32_t word, int i) {
    const uint32_t bits = ptx::and_or(word >> (4 * i), 0x000f000f, 0x43004300);
    return reinterpret_cast<const Two&>(bits);
  }
  static __device__ Two both(float x) { return __float2bfloat162_rn(x); }
};
template <>
struct CodePairs<Half> {
  using Two = __half2;
  static constexpr int kBase = 1024;
  static __device__ Two pair(uint32_t word, int i) {
    const uint32_t bits = ptx::and_or(word >> (4 * i), 0x000f000f, 0x64006400);
    return reinterpret_cast<const Two&>(bits);
  }
  static __device__ Two both(float x) { return __float2half2_rn(x); }
};

// A lane's words of a run of four-bit codes: of its two rows, where the first 8 of 16 weights and
// where the second are.
struct CodeWords {
  uint2 first, second;

  __device__ void load(const uint8_t* quants, int lane) {
    const uint8_t* words = quants + lane % 4 / 2 * 4 * kTileRows + lane / 4 * 8;
    first = *reinterpret_cast<const uint2*>(words);
    second = *reinterpret_cast<const uint2*>(words + 2 * 4 * kTileRows);
  }
};

// What the codes themselves are, zero points subtracted: at most eight bits and a sign, exact in T.
// zeros: of the two rows of the lane, in the two low bytes, where the format has them.
template <typename T, int kFormat>
__device__ inline void code_fragments(const CodeWords& words, int lane, uint32_t zeros,
                                      RunFragments& a) {
  using Word = PackedWord<kFormat, 2>;
  using Pairs = CodePairs<T>;
  static_assert(Word::kCodes == CodeFamily::kU4 && Word::kBlockSize == 32);
  const uint32_t selector = lane % 2 == 0 ? 0x5140 : 0x7362;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t codes = r == 0 ? __byte_perm(words.first.x, words.second.x, selector)
                                  : __byte_perm(words.first.y, words.second.y, selector);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto two = __hsub2(Pairs::pair(codes, i), Pairs::both(Pairs::kBase + Word::kOffset));
      if constexpr (Word::kHasZeros) {
        two = __hsub2(two, Pairs::both(static_cast<float>(zeros >> (8 * r) & 0xff)));
      }
      a[i % 2][i / 2 * 2 + r] = reinterpret_cast<const uint32_t&>(two);
    }
  }
}

// Weights, by float32 and rounded once, as dequantize rounds them.
template <typename T, int kFormat>
struct WeightFragments {
  using Word = PackedWord<kFormat, 2>;

  // run: of 32 weights in the packed blocks at `blocks`. Runs come in pairs from the same words:
  // neighbours, or in six-bit formats 64 apart, as the two nibbles of a word are.
  static __device__ constexpr int first_weight(int run) {
    const int pair = run / 2;
    if (Word::kSixBits) return 32 * (pair / 2 * 4 + pair % 2 + run % 2 * 2);
    return 32 * run;
  }
  // own: value_of_lane of PackedWord.
  static __device__ void decode(const uint8_t* blocks, int run, int lane, const TileScales& side,
                                float own, RunFragments& a) {
    const int word = lane % 4 / 2, row = lane / 4 * 2;
    const uint32_t selector = lane % 2 == 0 ? 0x5410 : 0x7632;
    if constexpr (Word::kBlockSize > 32) {
      const int pair = run / 2;
      const int first = Word::kSixBits ? pair / 2 * 16 + pair % 2 * 8 : 8 * pair;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        store(Word(blocks, first + 4 * step + word, row, selector), run % 2, own, a[step]);
      }
    } else {
      const uint8_t* block = blocks + run * Word::kPackedBytes;
      if constexpr (Word::kByteCodes) {
        store(Word(block, word, row, selector, side), 0, own, a[0]);
        store(Word(block, word + 4, row, selector, side), 0, own, a[1]);
      } else {
        const Word both(block, word, row, selector, side);
        if (kFloatScales && __any_sync(0xffffffff, has_long_scale(both))) {
          store_exactly(both, 0, a[0]);
          store_exactly(both, 1, a[1]);
        } else {
          store(both, 0, own, a[0]);
          store(both, 1, own, a[1]);
        }
      }
    }
  }

 private:
  // Scales of float32 may have more bits than decode_fused keeps: with 15 or fewer, as checkpoints
  // in 16 bits have, their products with 128 + a zero point of eight bits are exact.
  static constexpr bool kFloatScales = Word::kHasGroups && Word::kCodes == CodeFamily::kU4;
  static __device__ bool has_long_scale(const Word& word) {
    constexpr uint32_t kPast15Bits = 0x1ff;
    return ((__float_as_uint(word.scale(0, 0)) | __float_as_uint(word.scale(0, 1))) &
            kPast15Bits) != 0;
  }
  static __device__ void store_exactly(const Word& word, int part, uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float values[4];
      word.decode(part, r, values);
      a[r] = pack_two(values[0], values[1], T{});
      a[2 + r] = pack_two(values[2], values[3], T{});
    }
  }
  static __device__ void store(const Word& word, int part, float own, uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float values[4];
      word.decode_fused(part, r, own, values);
      a[r] = pack_two(values[0], values[1], T{});
      a[2 + r] = pack_two(values[2], values[3], T{});
    }
  }
};

}  // namespace llamatelemetry
