// Codes of the two rows of a lane in quant_stream.cuh: as they are loaded with an item, and decoded
// to fragments of W when it is multiplied. A pair of T is the codes 0 and 2, or 1 and 3, of four
// consecutive weights, kBase added to them, else less their zero point: exact in T either way.
#pragma once

#include <cstdint>
#include <type_traits>

#include "format/decode.cuh"
#include "gemm/stream_plan.h"
#include "ptx/nibbles.cuh"

namespace llamatelemetry {

// A pair of bfloat16 or float16, each operation exact as it is used here.
template <typename T>
struct PairOf;
template <>
struct PairOf<BFloat16> {
  using Type = __nv_bfloat162;
  // A byte of up to seven bits in the low end of the mantissa of 128.
  static constexpr uint32_t kLarge = 0x43004300;
  static constexpr uint32_t kLargeByte = 0x43434343;
};
template <>
struct PairOf<Half> {
  using Type = __half2;
  // Of 1024, with room for eight.
  static constexpr uint32_t kLarge = 0x64006400;
  static constexpr uint32_t kLargeByte = 0x64646464;
};
template <typename T>
__device__ inline uint32_t pair_minus(uint32_t a, uint32_t b) {
  using Pair = typename PairOf<T>::Type;
  const Pair pair = __hsub2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(pair);
}
template <typename T>
__device__ inline uint32_t pair_times(uint32_t a, uint32_t b) {
  using Pair = typename PairOf<T>::Type;
  const Pair pair = __hmul2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(pair);
}

// Nibbles: one shift and one logical operation for two codes, which leave them kBase too large.
// Pairs 0 and 2 are the low nibbles, the group's weights 0 and 2, and 1 and 3; pairs 1 and 3
// likewise the high ones.
template <typename T>
struct NibblePairs;
template <>
struct NibblePairs<BFloat16> {
  static constexpr int kBase = 128;  // a code is the low end of the mantissa
  static __device__ uint32_t pair(uint32_t word, int i) {
    return ptx::and_or(word >> (4 * i), 0x000f000f, 0x43004300);
  }
};
template <>
struct NibblePairs<Half> {
  static constexpr int kBase = 16;  // a code is the high end: sums lose less than with 1024
  static __device__ uint32_t pair(uint32_t word, int i) {
    const uint32_t shifted = i < 2 ? word << (6 - 4 * i) : word >> (4 * i - 6);
    return ptx::and_or(shifted, 0x03c003c0, 0x4c004c00);
  }
};

// Codes of up to six bits, a byte each, less zero.
template <typename T>
__device__ inline void few_bits_to_pairs(uint32_t codes, int zero, uint32_t& even, uint32_t& odd) {
  constexpr uint32_t kEven = 0x4240, kOdd = 0x4341;
  const uint32_t offset = PairOf<T>::kLarge | static_cast<uint32_t>(zero) * 0x10001;
  even = pair_minus<T>(__byte_perm(codes, PairOf<T>::kLargeByte, kEven), offset);
  odd = pair_minus<T>(__byte_perm(codes, PairOf<T>::kLargeByte, kOdd), offset);
}

// int8, bytes 0 and 2 of codes. Of bfloat16 the mantissa has room for seven bits; the eighth, which
// counts -128, is the lowest of the exponent: 128, or 256 where it is set, is subtracted.
__device__ inline uint32_t int8_to_pair(uint32_t codes, BFloat16) {
  const uint32_t low_bits = ptx::and_or(codes, 0x007f007f, PairOf<BFloat16>::kLarge);
  const uint32_t sign = ptx::and_or(codes, 0x00800080, PairOf<BFloat16>::kLarge);
  return pair_minus<BFloat16>(low_bits, sign);
}
__device__ inline uint32_t int8_to_pair(uint32_t codes, Half) {
  constexpr uint32_t kOffset = PairOf<Half>::kLarge | 0x00800080;  // 1152
  return pair_minus<Half>(ptx::and_xor(codes, 0x00ff00ff, kOffset), kOffset);
}

// E4M3, bytes 1 and 3 of codes: shifted to its place the exponent is as much too small as it has
// another bias.
__device__ inline uint32_t e4m3_to_pair(uint32_t codes, BFloat16) {
  constexpr uint32_t kScale = 0x7b807b80;  // 2^120
  return pair_times<BFloat16>(ptx::and_or(codes, 0x80008000, codes >> 4 & 0x07f007f0), kScale);
}
__device__ inline uint32_t e4m3_to_pair(uint32_t codes, Half) {
  constexpr uint32_t kScale = 0x5c005c00;  // 2^8
  return pair_times<Half>(ptx::and_or(codes, 0x80008000, codes >> 1 & 0x3f803f80), kScale);
}

// What a byte of two nibbles names: the value of its low one, then of its high one. Of a table in
// shared memory, from this lane's bank on.
__device__ inline uint32_t pair_of_byte(const char* table, uint32_t word, int byte) {
  const uint32_t index = __byte_perm(word, 0, 0x4440 + byte);
  return *reinterpret_cast<const uint32_t*>(table + index * kStreamPairBytes);
}

// Of kRuns times 32 weights: whole blocks. Run after run; a lane has groups lane_in_group and
// lane_in_group + 4 of each.
template <typename T, typename Word, int kRuns>
struct StreamWeights {
  static constexpr CodeFamily kCodes = Word::kCodes;
  static constexpr bool kSuperBlocks = Word::kBlockSize == 256;
  static constexpr bool kNibbles = kCodes == CodeFamily::kU4;
  static constexpr bool kTable = is_stream_table(kCodes);
  static constexpr int kBase = kNibbles ? NibblePairs<T>::kBase : 0;
  static constexpr int kFourWords = 4 * 4 * kTileRows;  // bytes of what a group of lanes loads
  static constexpr int kWordsOfRun = Word::kByteCodes ? 2 : 1;
  // Of the planes of high bits of 256 weights.
  static constexpr int kHighWords = Word::kFiveBits ? 2 : Word::kSixBits ? 4 : 0;
  static_assert(!Word::kFifthInOneWord);

  uint2 words[kRuns * kWordsOfRun];
  uint2 high[kHighWords > 0 ? kHighWords : 1];

  // from: the first block, 4 * kTileRows * lane_in_group on; rows 2 * group and 2 * group + 1.
  __device__ void load(const uint8_t* from, int group) {
#pragma unroll
    for (int i = 0; i < kRuns * kWordsOfRun; ++i) {
      const int run = i / kWordsOfRun;
      const int at =
          kSuperBlocks ? i * kFourWords : run * Word::kPackedBytes + i % kWordsOfRun * kFourWords;
      words[i] = ptx::load_streamed_8(from + Word::kQuants + at + 8 * group);
    }
#pragma unroll
    for (int i = 0; i < kHighWords; ++i) {
      high[i] = ptx::load_streamed_8(from + Word::kHighBits + i * kFourWords + 8 * group);
    }
  }

  // The A operands of the first and the last 16 weights of a run; by a table, of each eight of
  // either half, of which a byte of a word has one each.
  __device__ void fragments(int run, const char* table, uint32_t (&a)[2][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kTable) {
        const uint2 word = words[run];
        a[half][0] = pair_of_byte(table, word.x, 2 * half);
        a[half][2] = pair_of_byte(table, word.x, 2 * half + 1);
        a[half][1] = pair_of_byte(table, word.y, 2 * half);
        a[half][3] = pair_of_byte(table, word.y, 2 * half + 1);
        continue;
      }
      const uint2 word = words[word_of(run, half)];
      const uint2 plane = high[kHighWords == 0 ? 0 : plane_of(run, half)];
      pairs(run, half, word.x, plane.x, a[half][0], a[half][2]);
      pairs(run, half, word.y, plane.y, a[half][1], a[half][3]);
    }
  }

 private:
  // In blocks of 256 a word's nibbles are of two runs, else they are halves of one.
  static __device__ constexpr int word_of(int run, int half) {
    if constexpr (Word::kByteCodes) return 2 * run + half;
    if constexpr (Word::kSixBits) return 4 * (run / 4) + 2 * (run % 2) + half;
    return kSuperBlocks ? run / 2 * 2 + half : run;
  }
  static __device__ constexpr int nibble_of(int run, int half) {
    if constexpr (Word::kSixBits) return run % 4 / 2;
    return kSuperBlocks ? run % 2 : half;
  }
  static __device__ constexpr int plane_of(int run, int half) {
    return Word::kSixBits ? 2 * (run / 4) + half : half;
  }

  static __device__ void pairs(int run, int half, uint32_t word, uint32_t plane, uint32_t& even,
                               uint32_t& odd) {
    const int nibble = nibble_of(run, half);
    if constexpr (kNibbles) {
      even = NibblePairs<T>::pair(word, nibble);
      odd = NibblePairs<T>::pair(word, 2 + nibble);
    } else if constexpr (Word::kFloating) {
      even = e4m3_to_pair(word << 8, T{});
      odd = e4m3_to_pair(word, T{});
    } else if constexpr (Word::kByteCodes) {
      even = int8_to_pair(word, T{});
      odd = int8_to_pair(word >> 8, T{});
    } else {
      constexpr uint32_t kMask = Word::kSixBits ? 0x30303030 : 0x10101010;
      const int from = Word::kSixBits ? 2 * (run % 4) : run;  // bits that belong at 4
      const uint32_t shifted = from < 4 ? plane << (4 - from) : plane >> (from - 4);
      const uint32_t codes = ptx::and_or(shifted, kMask, word >> (4 * nibble) & 0x0f0f0f0f);
      few_bits_to_pairs<T>(codes, Word::kOffset, even, odd);
    }
  }
};

}  // namespace llamatelemetry
