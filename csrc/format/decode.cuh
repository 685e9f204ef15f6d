// Decodes packed weights (format/layout.h) into float, exactly as dequantize does.
#pragma once

#include <cstdint>

#include "format/format.h"
#include "format/groups.h"
#include "tile/convert.cuh"

namespace llamatelemetry {

// The same unit of kRows consecutive rows: one load of 2 * kRows or 4 * kRows bytes.
template <typename Unit, int kRows>
struct alignas(sizeof(Unit) * kRows) RowUnits {
  Unit row[kRows];
};

template <typename Unit, int kRows>
__device__ inline RowUnits<Unit, kRows> load_row_units(const uint8_t* field, int unit, int row) {
  const auto* units = reinterpret_cast<const Unit*>(field) + kTileRows * unit + row;
  return *reinterpret_cast<const RowUnits<Unit, kRows>*>(units);
}

// Byte i of codes, minus offset: the byte becomes the low end of the mantissa of 2^23.
__device__ inline float byte_to_float(uint32_t codes, int i, int offset) {
  const float shifted = __uint_as_float(__byte_perm(codes, 0x4b000000, 0x7650 + i));
  return shifted - static_cast<float>(0x800000 + offset);
}

// What nibbles name in a table of 16 bytes: of the low nibbles of a word, or of its high ones.
__device__ inline uint32_t look_up(const CodeTable& table, uint32_t word, int part) {
  const uint32_t in_half = word & 0x77777777;
  const uint32_t half = (word & 0x88888888) >> 1 | 0x32103210;  // of the table: byte i, or 4 + i
  uint32_t four[2];  // of the two low bytes of the word, and of the two high ones
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t selector = in_half >> (16 * i);
    const uint32_t low = __byte_perm(static_cast<uint32_t>(table.low),
                                     static_cast<uint32_t>(table.low >> 32), selector);
    const uint32_t high = __byte_perm(static_cast<uint32_t>(table.high),
                                      static_cast<uint32_t>(table.high >> 32), selector);
    four[i] = __byte_perm(low, high, half >> (16 * i));
  }
  return __byte_perm(four[0], four[1], part == 0 ? 0x6420 : 0x7531);
}

// Digit d of base 3 of each byte of a word.
__device__ inline uint32_t ternary_digits(uint32_t word, int d) {
  constexpr uint32_t kEvenBytes = 0x00ff00ff;
  const uint32_t power = d == 4 ? 81 : 0x1b090301u >> (8 * d) & 0xff;
  const uint32_t even = 3 * ((word & kEvenBytes) * power & kEvenBytes);
  const uint32_t odd = 3 * ((word >> 8 & kEvenBytes) * power & kEvenBytes);
  return (even >> 8 & kEvenBytes) | (odd & ~kEvenBytes);
}

// Codes 2 * pair and 2 * pair + 1 of a word of E4M3 as float16, exactly: shifted to its place a
// code is 2^8 times too small.
__device__ inline __half2 e4m3_to_half(uint32_t codes, int pair) {
  const uint32_t two = __byte_perm(codes, 0, pair == 0 ? 0x1404 : 0x3424);
  const uint32_t bits = (two & 0x80008000) | (two & 0x7f007f00) >> 1;
  return __hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(256.0f));
}

// The value that the four low bits of index name.
template <CodeFamily kCodes>
__device__ inline float table_value(uint32_t index) {
  static constexpr __device__ FloatTable kTable = float_table(kCodes);
  return __ldg(kTable.values + (index & 15));
}
// Likewise where all lanes of a warp ask at once, each with value threadIdx.x % 16 at hand.
__device__ inline float table_value_of_warp(float own, uint32_t index) {
  return __shfl_sync(0xffffffff, own, static_cast<int>(index), 16);
}

// 2^(e - 128), subnormal for the two smallest.
__device__ inline float exponent_bits_to_float(uint32_t e) {
  return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
}

// Word `word` of the quants of a packed block, for rows row .. row + kRows - 1: num_parts(word), at
// most kParts, groups of four consecutive weights in each row, whose first one is
// first_weight(word, part) of its block.
template <int kFormat, int kRows>
class PackedWord {
 public:
  static constexpr FormatDescriptor kDescriptor = kFormats[kFormat];
  static_assert(is_decodable(kDescriptor));
  static constexpr BlockLayout kLayout = block_layout(kFormat);
  static constexpr CodeFamily kCodes = kDescriptor.codes;
  static constexpr ScaleRule kScaleRule = kDescriptor.scale_rule;
  static constexpr bool kByteCodes = is_byte(kCodes);
  static constexpr bool kFloating = is_floating(kCodes);
  static constexpr bool kSixBits = kCodes == CodeFamily::kU6;
  static constexpr bool kFiveBits = kCodes == CodeFamily::kU5;
  static constexpr bool kThreeBits = kCodes == CodeFamily::kU3;
  static constexpr bool kTwoBitQuants = kCodes == CodeFamily::kU2 || kThreeBits;
  static constexpr bool kTernary = kCodes == CodeFamily::kTernary;
  static constexpr bool kHasTable = has_code_table(kCodes);
  static constexpr bool kHasFloatTable = has_float_table(kCodes);
  // Unsigned, codes of other families have at most seven bits.
  static constexpr bool kEightBits = kByteCodes || kCodes == CodeFamily::kIq4;
  static constexpr bool kFifthInOneWord = kFiveBits && has_fifth_bits_word(kLayout);
  // Scales in a tensor beside the blocks; zero points there are subtracted as kOffset is.
  static constexpr bool kHasGroups = kDescriptor.takes_scales();
  static constexpr bool kHasZeros = kDescriptor.takes_zeros;
  static constexpr bool kHasMin = kLayout.min.bytes > 0;
  static constexpr int kQuants = kLayout.quants.packed;
  static constexpr int kHighBits = kLayout.high_bits.packed;
  static constexpr int kSubScales = kLayout.sub_scales.packed;
  static constexpr int kSubScalesHigh = kLayout.sub_scales_high.packed;
  static constexpr int kScale = kLayout.scale.packed;
  static constexpr int kMin = kLayout.min.packed;
  static constexpr int kOffset = unsigned_zero_point(kDescriptor);
  static constexpr int kBlockSize = kLayout.block_size;
  static constexpr int kPackedBytes = kTileRows * kLayout.block_bytes;
  static constexpr int kWordsPerBlock = kLayout.quants.bytes / 4;
  static constexpr int kParts = kByteCodes ? 1 : kTernary ? 5 : kTwoBitQuants ? 4 : 2;
  static constexpr int kScales = has_one_scale(kScaleRule) ? 1 : kParts;
  // Whether the two nibbles of a word, or the digits of one, belong to the same 32 weights: else
  // its parts are the same group of different sub-blocks.
  static constexpr bool kGroupsOfOneSubBlock = kBlockSize == 32 || kHasTable || kTernary;

  static __device__ constexpr int num_parts(int word) {
    return kTernary && word == kWordsPerBlock - 1 ? 4 : kParts;
  }
  static __device__ constexpr int first_weight(int word, int part) {
    return 32 * sub_block(word, part) + 4 * group(word, part);
  }

  // Where group g, of eight, of a sub-block of 32 weights is.
  static __device__ constexpr int word_of(int sub_block, int group) {
    if constexpr (kByteCodes) return group;
    if constexpr (kTernary) {
      if (sub_block < 5) return group;
      return sub_block == 7 && group >= 4 ? 12 : 8 + group % 4;
    }
    if constexpr (kGroupsOfOneSubBlock) return 4 * sub_block + group % 4;
    if constexpr (kSixBits) return 16 * (sub_block / 4) + 8 * (sub_block % 2) + group;
    return sub_block / kParts * 8 + group;
  }
  static __device__ constexpr int part_of(int sub_block, int group) {
    if constexpr (kByteCodes) return 0;
    if constexpr (kTernary) {
      if (sub_block < 5) return sub_block;
      return sub_block == 7 && group >= 4 ? group - 4 : 2 * (sub_block - 5) + group / 4;
    }
    if constexpr (kGroupsOfOneSubBlock) return group / 4;
    if constexpr (kSixBits) return sub_block % 4 / 2;
    return sub_block % kParts;
  }

  // side: of formats with scales beside their blocks, those of the word's group.
  __device__ PackedWord(const uint8_t* block, int word, int row, const TileScales& side = {})
      : word_(word) {
    quants_ = load_row_units<uint32_t, kRows>(block + kQuants, word, row);
    if constexpr (kFifthInOneWord) {
      high_bits_ = load_row_units<uint32_t, kRows>(block + kHighBits, 0, row);
    } else if constexpr (kFiveBits || kThreeBits) {
      high_bits_ = load_row_units<uint32_t, kRows>(block + kHighBits, word % 8, row);
    } else if constexpr (kSixBits) {
      high_bits_ =
          load_row_units<uint32_t, kRows>(block + kHighBits, word / 16 * 8 + word % 8, row);
    }
    if constexpr (kHasGroups) {
      read_group(side, row);
      return;
    }
    float scale[kRows], min[kRows];
    if constexpr (kScaleRule == ScaleRule::kExponent) {
      const auto exponents = load_row_units<uint8_t, kRows>(block + kScale, 0, row);
#pragma unroll
      for (int r = 0; r < kRows; ++r) scale[r] = exponent_bits_to_float(exponents.row[r]);
    } else {
      load_halves(block + kScale, row, scale);
    }
    if constexpr (kHasMin) load_halves(block + kMin, row, min);
#pragma unroll
    for (int part = 0; part < kScales; ++part) {
      int scale_factor[kRows], min_factor[kRows];
      sub_scales(block, row, part, scale_factor, min_factor);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scale_[part][r] = scale[r] * static_cast<float>(scale_factor[r]);
        if constexpr (kHasMin) min_[part][r] = min[r] * static_cast<float>(min_factor[r]);
      }
    }
  }

  // Half of the bytes of words `word` and `word + 2`, which selector of __byte_perm picks, as one:
  // the group of a part is then made of two half groups, 8 weights apart.
  __device__ PackedWord(const uint8_t* block, int word, int row, uint32_t selector,
                        const TileScales& side = {})
      : PackedWord(block, word, row, side) {
    static_assert(!is_low_bit(kCodes));
    const auto quants = load_row_units<uint32_t, kRows>(block + kQuants, word + 2, row);
    RowUnits<uint32_t, kRows> high_bits = high_bits_;
    if constexpr (kFiveBits && !kFifthInOneWord) {
      high_bits = load_row_units<uint32_t, kRows>(block + kHighBits, word % 8 + 2, row);
    } else if constexpr (kSixBits) {
      high_bits =
          load_row_units<uint32_t, kRows>(block + kHighBits, word / 16 * 8 + word % 8 + 2, row);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      quants_.row[r] = __byte_perm(quants_.row[r], quants.row[r], selector);
      // In one word of fifth bits a group has a bit of each byte: two groups on is two bits up.
      const uint32_t high = kFifthInOneWord ? high_bits.row[r] >> 2 : high_bits.row[r];
      high_bits_.row[r] = __byte_perm(high_bits_.row[r], high, selector);
    }
  }

  // weights[i] = scale * code[i] - min for the four weights of a group. The product is exact.
  __device__ void decode(int part, int r, float (&weights)[4]) const {
    const uint32_t codes = this->codes(part, r);
    if constexpr (kHasFloatTable) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[i] = scale(part, r) * table_value<kCodes>(codes >> (8 * i));
      }
    } else if constexpr (kFloating) {
      decode_floating(codes, scale(part, r), weights);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float product = scale(part, r) * byte_to_float(codes, i, offset(r));
        weights[i] = kHasMin ? product - min(part, r) : product;
      }
    }
  }

  // Likewise by a permutation of bytes and a fused multiply-add for each weight; only the sign of a
  // zero can differ. A code becomes the mantissa of a float: of 128 if it has at most 7 bits, else
  // of 2^15. Either has so few bits that its product with a scale of 16 bits and the zero point is
  // exact; bytes with a scale of float32 go decode's way, for what 2^15 of it loses. All lanes of a
  // warp call it at once, each with its value_of_lane.
  __device__ void decode_fused(int part, int r, float own, float (&weights)[4]) const {
    static_assert(!is_low_bit(kCodes));
    if constexpr (kHasFloatTable) {
      const uint32_t quants = quants_.row[r] >> (4 * part);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[i] = scale(part, r) * table_value_of_warp(own, quants >> (8 * i));
      }
    } else if constexpr (kHasGroups && kByteCodes) {
      decode(part, r, weights);
    } else {
      decode_shifted(part, r, weights);
    }
  }

  // What a lane keeps for decode_fused: its value of the float table, if there is one.
  static __device__ float value_of_lane() {
    if constexpr (kHasFloatTable) return table_value<kCodes>(threadIdx.x);
    return 0.0f;
  }

  __device__ float scale(int part, int r) const { return scale_[kScales == 1 ? 0 : part][r]; }
  // What is subtracted from a code of a row.
  __device__ int offset(int r) const {
    if constexpr (kHasZeros) return kOffset + zeros_.row[r];
    return kOffset;
  }
  __device__ float min(int part, int r) const { return min_[kScales == 1 ? 0 : part][r]; }

  // The codes of a group, one in each byte; offset is to be subtracted, from integers.
  __device__ uint32_t codes(int part, int r) const {
    const uint32_t quants = quants_.row[r];
    if constexpr (kCodes == CodeFamily::kE4m3) return quants;
    if constexpr (kByteCodes) return quants ^ 0x80808080;
    if constexpr (kHasTable) return look_up(code_table(kCodes), quants, part);
    if constexpr (kTernary) return ternary_digits(quants, part);
    if constexpr (kTwoBitQuants) {
      const uint32_t low = quants >> (2 * part) & 0x03030303;
      if constexpr (!kThreeBits) return low;
      return low | (high_bits_.row[r] >> sub_block(word_, part) & 0x01010101) << 2;
    }
    const uint32_t nibbles = quants >> (4 * part) & 0x0f0f0f0f;
    if constexpr (kFifthInOneWord) {
      return nibbles | (high_bits_.row[r] >> (word_ + 4 * part) & 0x01010101) << 4;
    } else if constexpr (kFiveBits) {
      return nibbles | (high_bits_.row[r] >> sub_block(word_, part) & 0x01010101) << 4;
    } else if constexpr (kSixBits) {
      const int plane = sub_block(word_, part) % 4;
      return nibbles | (high_bits_.row[r] >> (2 * plane) & 0x03030303) << 4;
    }
    return nibbles;
  }

 private:
  __device__ void decode_shifted(int part, int r, float (&weights)[4]) const {
    const uint32_t codes = this->codes(part, r);
    const float scale = this->scale(part, r);
    [[maybe_unused]] const auto zero = static_cast<float>(offset(r));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kHasMin) {
        weights[i] = __fmaf_rn(scale, byte_to_float(codes, i, kOffset), -min(part, r));
      } else if constexpr (kByteCodes) {
        const float shifted = __uint_as_float(__byte_perm(codes, 0x47000000, 0x7404 + 0x10 * i));
        weights[i] = __fmaf_rn(shifted, scale, -(32768.0f + zero) * scale);
      } else {
        const float shifted = __uint_as_float(__byte_perm(codes, 0x43000000, 0x7044 + 0x100 * i));
        weights[i] = __fmaf_rn(shifted, scale, -(128.0f + zero) * scale);
      }
    }
  }

  static __device__ void decode_floating(uint32_t codes, float scale, float (&weights)[4]) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const float2 two = __half22float2(e4m3_to_half(codes, pair));
      weights[2 * pair] = scale * two.x;
      weights[2 * pair + 1] = scale * two.y;
    }
  }

  __device__ void read_group(const TileScales& side, int row) {
    const auto scales =
        load_row_units<float, kRows>(reinterpret_cast<const uint8_t*>(side.scales), 0, row);
#pragma unroll
    for (int r = 0; r < kRows; ++r) scale_[0][r] = scales.row[r];
    if constexpr (kHasZeros) zeros_ = load_row_units<uint8_t, kRows>(side.zeros, 0, row);
  }

  // The sub-block of 32 weights that a part of a word belongs to, and which group of it it is.
  static __device__ constexpr int sub_block(int word, int part) {
    if constexpr (kBlockSize == 32) return 0;
    if constexpr (kTernary) return word < 8 ? part : word < 12 ? 5 + part / 2 : 7;
    if constexpr (kGroupsOfOneSubBlock) return word / 4;
    if constexpr (kSixBits) return word / 16 * 4 + word / 8 % 2 + 2 * part;
    return word / 8 * kParts + part;
  }
  static __device__ constexpr int group(int word, int part) {
    if constexpr (kByteCodes) return word;
    if constexpr (kTernary) {
      return word < 8 ? word : word < 12 ? 4 * (part % 2) + word - 8 : 4 + part;
    }
    if constexpr (kGroupsOfOneSubBlock) return word % 4 + 4 * part;
    return word % 8;
  }

  static __device__ void load_halves(const uint8_t* field, int row, float (&values)[kRows]) {
    const auto halves = load_row_units<uint16_t, kRows>(field, 0, row);
#pragma unroll
    for (int r = 0; r < kRows; ++r) values[r] = half_bits_to_float(halves.row[r]);
  }

  // The integers that scale and min of the block are multiplied with.
  __device__ void sub_scales(const uint8_t* block, int row, int part, int (&scale)[kRows],
                             int (&min)[kRows]) const {
    if constexpr (kScaleRule == ScaleRule::kSubBlock32) {
      const int sub = sub_block(word_, part);
      const int shift = 8 * (sub % 4);
      const auto a = load_row_units<uint32_t, kRows>(block + kSubScales, 0, row);
      const auto b = load_row_units<uint32_t, kRows>(block + kSubScales, 1, row);
      const auto c = load_row_units<uint32_t, kRows>(block + kSubScales, 2, row);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t low = a.row[r] >> shift, low_min = b.row[r] >> shift;
        const uint32_t high = c.row[r] >> shift;
        scale[r] = sub < 4 ? low & 0x3f : (high & 0x0f) | (low >> 2 & 0x30);
        min[r] = sub < 4 ? low_min & 0x3f : (high >> 4 & 0x0f) | (low_min >> 2 & 0x30);
      }
    } else if constexpr (kScaleRule == ScaleRule::kSubBlock16) {
      const int sixteen = first_weight(word_, part) / 16;
      const auto words = load_row_units<uint32_t, kRows>(block + kSubScales, sixteen / 4, row);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scale[r] = static_cast<int8_t>(words.row[r] >> (8 * (sixteen % 4)));
      }
    } else if constexpr (kScaleRule == ScaleRule::kSubBlock16Four) {
      const int sixteen = first_weight(word_, part) / 16;
      const auto words = load_row_units<uint32_t, kRows>(block + kSubScales, sixteen / 4, row);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scale[r] = words.row[r] >> (8 * (sixteen % 4)) & 15;
        min[r] = words.row[r] >> (8 * (sixteen % 4) + 4) & 15;
      }
    } else if constexpr (kScaleRule == ScaleRule::kSubBlock16Six) {
      const int sixteen = first_weight(word_, part) / 16;
      const int byte = 8 * (sixteen % 4), four = sixteen / 4;
      const auto low = load_row_units<uint32_t, kRows>(block + kSubScales, four % 2, row);
      const auto high = load_row_units<uint32_t, kRows>(block + kSubScales, 2, row);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t two = high.row[r] >> (byte + 2 * four) & 3;
        scale[r] = static_cast<int>((low.row[r] >> (byte + four / 2 * 4) & 15) | two << 4) - 32;
      }
    } else if constexpr (kScaleRule == ScaleRule::kSubBlock32Six) {
      const int sub = sub_block(word_, part);
      const auto low = load_row_units<uint32_t, kRows>(block + kSubScales, 0, row);
      const auto high = load_row_units<uint16_t, kRows>(block + kSubScalesHigh, 0, row);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t two = high.row[r] >> (2 * sub) & 3;
        scale[r] = static_cast<int>((low.row[r] >> (4 * sub) & 15) | two << 4) - 32;
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scale[r] = 1;
        min[r] = -1;  // this rule adds the minimum
      }
    }
  }

  int word_;
  RowUnits<uint32_t, kRows> quants_;
  RowUnits<uint32_t, kRows> high_bits_;
  RowUnits<uint8_t, kRows> zeros_;  // of formats that have zero points beside their blocks
  float scale_[kScales][kRows];
  float min_[kScales][kRows];
};

}  // namespace llamatelemetry
