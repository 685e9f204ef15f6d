// A packed block (format/layout.h) as codes and scales of 16 rows at a time: how every
// kernel over packed weights decodes them on the CPU. (Whole rows of a file: format/gguf.h.)
//
//   weight = scale * (code - kZeroPoint) + min     in sub-blocks of 32 weights
#pragma once

#include "format/format.h"
#include "format/groups.h"
#include "format/tile_rows_cpu.h"

namespace llamatelemetry {
namespace LT_ISA {

constexpr int kSubBlock = 32;
constexpr int kGroups = kSubBlock / 4;  // words of codes in a sub-block

#define LT_MEMBER inline __attribute__((always_inline))  // of a class of this level's namespace

// The largest code read as unsigned: how many products of it an integer of 16 bits holds.
static constexpr int largest_code(CodeFamily codes) {
  switch (codes) {
    case CodeFamily::kU4: return 15;
    case CodeFamily::kU5: return 31;
    case CodeFamily::kU6: return 63;
    case CodeFamily::kU2: return 3;
    case CodeFamily::kU3: return 7;
    case CodeFamily::kE2m1: return 24;
    case CodeFamily::kTernary: return 2;
    case CodeFamily::kS8:
    case CodeFamily::kIq4:
    case CodeFamily::kE4m3:
    case CodeFamily::kNf4:
    case CodeFamily::kFp4: break;
  }
  return 255;
}

// Digit d of base 3 of each byte.
LT_INLINE Words words_ternary_digit(Words a, int d) {
  const Words even_bytes = words_set(0x00ff00ff);
  Words even = a & even_bytes, odd = a >> 8 & even_bytes;
  for (int i = 0; i < d; ++i) {
    even = (even + even + even) & even_bytes;
    odd = (odd + odd + odd) & even_bytes;
  }
  return ((even + even + even) >> 8 & even_bytes) |
         ((odd + odd + odd) & words_set(static_cast<int32_t>(0xff00ff00)));
}

template <int kFormat>
struct PackedBlock {
  static constexpr FormatDescriptor kDescriptor = kFormats[kFormat];
  static_assert(is_decodable(kDescriptor));
  static constexpr CodeFamily kCodes = kDescriptor.codes;
  static constexpr ScaleRule kScaleRule = kDescriptor.scale_rule;
  static constexpr BlockLayout kLayout = block_layout(kFormat);
  static constexpr int kBytes = kTileRows * kLayout.block_bytes;
  static constexpr int kSubBlocks = kLayout.block_size / kSubBlock;
  static constexpr bool kHasGroups = kDescriptor.takes_scales();
  static constexpr bool kHasMin = kLayout.min.bytes != 0 || kDescriptor.takes_zeros;
  static constexpr int kScalesPerSubBlock = has_scale_per_16(kScaleRule) ? 2 : 1;
  static constexpr int kScales = has_one_scale(kScaleRule) ? 1 : kSubBlocks * kScalesPerSubBlock;
  static constexpr int kZeroPoint = unsigned_zero_point(kDescriptor);
  static constexpr int kLargestCode = largest_code(kCodes);

  const uint8_t* bytes;
  Floats scales[kScales];
  Floats mins[kHasMin ? kScales : 1];

  // side: of formats with scales beside their blocks, those of the block's group.
  explicit LT_MEMBER PackedBlock(const uint8_t* block, const TileScales& side = {}) : bytes(block) {
    if constexpr (kHasGroups) {
      read_group(side);
      return;
    }
    if constexpr (kScaleRule == ScaleRule::kExponent) {
      scales[0] = exponents(kLayout.scale);
    } else {
      scales[0] = halves(kLayout.scale);
    }
    if constexpr (kHasMin) mins[0] = halves(kLayout.min);
    if constexpr (!has_one_scale(kScaleRule)) read_sub_scales();
  }

  // Of half `half` of a sub-block, where 16 weights share a scale; else half is 0.
  LT_MEMBER const Floats& scale(int sub_block, int half) const {
    return scales[kScales == 1 ? 0 : sub_block * kScalesPerSubBlock + half];
  }
  LT_MEMBER const Floats& min(int sub_block, int half) const {
    return mins[kScales == 1 ? 0 : sub_block * kScalesPerSubBlock + half];
  }

  // The codes of one sub-block, unsigned: byte i of code[g] belongs to weight 4g + i.
  LT_MEMBER void codes(int sub_block, Words (&code)[kGroups]) const {
    if constexpr (kCodes == CodeFamily::kE4m3) {
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) code[g] = word(kLayout.quants, g);
    } else if constexpr (kCodes == CodeFamily::kS8) {
      const Words sign = words_set(static_cast<int32_t>(0x80808080));
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) code[g] = word(kLayout.quants, g) ^ sign;
    } else if constexpr (has_code_table(kCodes) || kSubBlocks == 1) {
      nibble_pairs(sub_block, code);
    } else if constexpr (kCodes == CodeFamily::kTernary) {
      ternary_codes(sub_block, code);
    } else if constexpr (kCodes == CodeFamily::kU2 || kCodes == CodeFamily::kU3) {
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) {
        const Words quarters = word(kLayout.quants, 8 * (sub_block / 4) + g);
        code[g] = quarters >> (2 * (sub_block % 4)) & words_set(0x03030303);
        if constexpr (kCodes == CodeFamily::kU3) {
          const Words third = word(kLayout.high_bits, g) >> sub_block;
          code[g] = code[g] | ((third & words_set(0x01010101)) << 2);
        }
      }
    } else {
      nibble_planes(sub_block, code);
    }
  }

  // The weights of one sub-block: weight[j] is weight j of the 16 rows.
  LT_MEMBER void weights(int sub_block, Floats (&weight)[kSubBlock]) const {
    Words code[kGroups];
    codes(sub_block, code);
    const Floats zero_point = floats_set(kZeroPoint);
    for (int g = 0; g < kGroups; ++g) {
      const int half = g * kScalesPerSubBlock / kGroups;
      const Floats factor = scale(sub_block, half);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Floats value = code_to_float(code[g], i);
        if constexpr (kZeroPoint != 0) value = value - zero_point;
        // Without a minimum a plain product: adding 0 would turn -0 into 0.
        weight[4 * g + i] =
            kHasMin ? floats_fma(factor, value, min(sub_block, half)) : factor * value;
      }
    }
  }

 private:
  LT_MEMBER Words word(QuantField field, int index) const {
    return words_load(bytes + field.packed + index * kTileRows * 4);
  }
  LT_MEMBER Floats halves(QuantField field) const {
    return floats_load(reinterpret_cast<const Half*>(bytes + field.packed));
  }
  // 2^(e - 128), subnormal for the two smallest.
  LT_MEMBER Floats exponents(QuantField field) const {
    float values[kTileRows];
    for (int row = 0; row < kTileRows; ++row) {
      const uint32_t e = bytes[field.packed + row];
      const uint32_t bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
      std::memcpy(values + row, &bits, sizeof bits);
    }
    return floats_load(values);
  }

  static LT_MEMBER Floats code_to_float(Words code, int i) {
    if constexpr (!is_floating(kCodes)) return byte_to_float(code, i);
    if constexpr (has_float_table(kCodes)) {
      static constexpr FloatTable kTable = float_table(kCodes);
      return floats_look_up(kTable.values, code >> (8 * i));
    }
    // Exponent and mantissa in their places of a float: 2^120 times too small.
    const Words byte = code >> (8 * i) & words_set(0xff);
    const Words bits = (byte & words_set(0x7f)) << 20 | (byte & words_set(0x80)) << 24;
    Floats value;
    static_assert(sizeof value == sizeof bits);
    std::memcpy(&value, &bits, sizeof value);
    return value * floats_set(0x1p120f);
  }

  LT_MEMBER void read_group(const TileScales& side) {
    scales[0] = floats_load(side.scales);
    if constexpr (kDescriptor.takes_zeros) {
      float zeros[kTileRows];
      for (int row = 0; row < kTileRows; ++row) zeros[row] = -static_cast<float>(side.zeros[row]);
      mins[0] = scales[0] * floats_load(zeros);
    }
  }

  // scales[0] is d and mins[0] dmin.
  LT_MEMBER void read_sub_scales() {
    const Floats d = scales[0];
    const Words low_four = words_set(0x0f0f0f0f);
    if constexpr (kScaleRule == ScaleRule::kSubBlock16) {
#pragma GCC unroll 16
      for (int i = 0; i < kScales; ++i) {
        scales[i] = d * words_to_float(words_signed_byte(word(kLayout.sub_scales, i / 4), i % 4));
      }
    } else if constexpr (kScaleRule == ScaleRule::kSubBlock16Four) {
      const Floats minus_dmin = floats_set(0.0f) - mins[0];
#pragma GCC unroll 16
      for (int i = 0; i < kScales; ++i) {
        const Words four = word(kLayout.sub_scales, i / 4);
        scales[i] = d * byte_to_float(four & low_four, i % 4);
        mins[i] = minus_dmin * byte_to_float(four >> 4 & low_four, i % 4);
      }
    } else if constexpr (kScaleRule == ScaleRule::kSubBlock16Six) {
      const Words a = word(kLayout.sub_scales, 0);
      const Words b = word(kLayout.sub_scales, 1);
      const Words c = word(kLayout.sub_scales, 2);
      const Words low[4] = {a & low_four, b & low_four, a >> 4 & low_four, b >> 4 & low_four};
#pragma GCC unroll 16
      for (int i = 0; i < kScales; ++i) {
        const Words two = (c >> (2 * (i / 4)) & words_set(0x03030303)) << 4;
        scales[i] = d * (byte_to_float(low[i / 4] | two, i % 4) - floats_set(32.0f));
      }
    } else if constexpr (kScaleRule == ScaleRule::kSubBlock32Six) {
      const Words low = word(kLayout.sub_scales, 0);
      uint16_t high[kTileRows];
      std::memcpy(high, bytes + kLayout.sub_scales_high.packed, sizeof high);
      uint32_t widened[kTileRows];
      for (int row = 0; row < kTileRows; ++row) widened[row] = high[row];
      const Words two = words_load(reinterpret_cast<const uint8_t*>(widened));
#pragma GCC unroll 8
      for (int i = 0; i < kScales; ++i) {
        const Words six = (low >> (4 * i) & words_set(15)) | (two >> (2 * i) & words_set(3)) << 4;
        scales[i] = d * (words_to_float(six) - floats_set(32.0f));
      }
    } else {
      const Words a = word(kLayout.sub_scales, 0);
      const Words b = word(kLayout.sub_scales, 1);
      const Words c = word(kLayout.sub_scales, 2);
      const Words six = words_set(0x3f3f3f3f);
      const Words high_two = words_set(0x30303030);
      const Words scale[2] = {a & six, (c & low_four) | (a >> 2 & high_two)};
      const Words min[2] = {b & six, (c >> 4 & low_four) | (b >> 2 & high_two)};
      const Floats minus_dmin = floats_set(0.0f) - mins[0];
#pragma GCC unroll 8
      for (int i = 0; i < kScales; ++i) {
        scales[i] = d * byte_to_float(scale[i / 4], i % 4);
        mins[i] = minus_dmin * byte_to_float(min[i / 4], i % 4);
      }
    }
  }

  // Codes of words whose two nibbles belong to the same sub-block.
  LT_MEMBER void nibble_pairs(int sub_block, Words (&code)[kGroups]) const {
    const Words nibble = words_set(0x0f0f0f0f);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups / 2; ++g) {
      const Words pair = word(kLayout.quants, kGroups / 2 * sub_block + g);
      code[g] = pair & nibble;
      code[g + kGroups / 2] = pair >> 4 & nibble;
    }
    if constexpr (has_code_table(kCodes)) {
      constexpr CodeTable kTable = code_table(kCodes);
      uint8_t table[16];
      std::memcpy(table, &kTable.low, 8);
      std::memcpy(table + 8, &kTable.high, 8);
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) code[g] = words_look_up(table, code[g]);
    } else if constexpr (kLayout.high_bits.bytes != 0) {
      const Words fifth = word(kLayout.high_bits, 0);
      const Words bit_four = words_set(0x10101010);
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) {
        code[g] = code[g] | ((g < 4 ? fifth << (4 - g) : fifth >> (g - 4)) & bit_four);
      }
    }
  }

  // Those of words whose nibbles belong to different sub-blocks.
  LT_MEMBER void nibble_planes(int sub_block, Words (&code)[kGroups]) const {
    const Words nibble = words_set(0x0f0f0f0f);
    const int half = sub_block / 4, quarter = sub_block % 4;
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      if constexpr (kCodes == CodeFamily::kU6) {
        const Words low = word(kLayout.quants, 16 * half + 8 * (quarter % 2) + g);
        const Words high = word(kLayout.high_bits, 8 * half + g);
        code[g] = (low >> (4 * (quarter / 2)) & nibble) |
                  ((high >> (2 * quarter) & words_set(0x03030303)) << 4);
      } else {
        const Words pair = word(kLayout.quants, 8 * (sub_block / 2) + g);
        code[g] = pair >> (4 * (sub_block % 2)) & nibble;
        if constexpr (kLayout.high_bits.bytes != 0) {
          const Words fifth = word(kLayout.high_bits, g) >> sub_block;
          code[g] = code[g] | ((fifth & words_set(0x01010101)) << 4);
        }
      }
    }
  }

  // Five sub-blocks in the digits of eight words, two and a half in those of four, the rest in one.
  LT_MEMBER void ternary_codes(int sub_block, Words (&code)[kGroups]) const {
    for (int g = 0; g < kGroups; ++g) {
      if (sub_block < 5) {
        code[g] = words_ternary_digit(word(kLayout.quants, g), sub_block);
      } else if (sub_block == 7 && g >= 4) {
        code[g] = words_ternary_digit(word(kLayout.quants, 12), g - 4);
      } else {
        const int digit = 2 * (sub_block - 5) + g / 4;
        code[g] = words_ternary_digit(word(kLayout.quants, 8 + g % 4), digit);
      }
    }
  }
};

}  // namespace LT_ISA
}  // namespace llamatelemetry
