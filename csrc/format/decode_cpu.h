// A packed block (format/layout.h) as codes and scales of 16 rows at a time: how every
// kernel over packed weights decodes them on the CPU. (Whole rows of a file: format/gguf.h.)
//
//   weight = scale * (code - kZeroPoint) + min     in sub-blocks of 32 weights
#pragma once

#include "format/format.h"
#include "format/tile_rows_cpu.h"

namespace llamatelemetry {
namespace LT_ISA {

constexpr int kSubBlock = 32;
constexpr int kGroups = kSubBlock / 4;  // words of codes in a sub-block

#define LT_MEMBER inline __attribute__((always_inline))  // of a class of this level's namespace

template <int kFormat>
struct PackedBlock {
  static constexpr FormatDescriptor kDescriptor = kFormats[kFormat];
  static_assert(is_decodable(kDescriptor));
  static constexpr BlockLayout kLayout = block_layout(kFormat);
  static constexpr int kBytes = kTileRows * kLayout.block_bytes;
  static constexpr int kSubBlocks = kLayout.block_size / kSubBlock;
  static constexpr bool kHasMin = kLayout.min.bytes != 0;
  static constexpr int kScalesPerSubBlock =
      kDescriptor.scale_rule == ScaleRule::kSubBlock16 ? 2 : 1;
  static constexpr int kZeroPoint = unsigned_zero_point(kDescriptor);
  static constexpr int kCodeBits = kDescriptor.codes == CodeFamily::kS8 ? 8 : 6;  // at most

  const uint8_t* bytes;
  Floats scales[kSubBlocks * kScalesPerSubBlock];
  Floats mins[kSubBlocks];

  explicit LT_MEMBER PackedBlock(const uint8_t* block) : bytes(block) {
    const Floats d = halves(kLayout.scale);
    if constexpr (kDescriptor.scale_rule == ScaleRule::kSubBlock16) {
#pragma GCC unroll 16
      for (int i = 0; i < kSubBlocks * kScalesPerSubBlock; ++i) {
        scales[i] = d * words_to_float(words_signed_byte(word(kLayout.sub_scales, i / 4), i % 4));
      }
    } else if constexpr (kDescriptor.scale_rule == ScaleRule::kSubBlock32) {
      const Words a = word(kLayout.sub_scales, 0);
      const Words b = word(kLayout.sub_scales, 1);
      const Words c = word(kLayout.sub_scales, 2);
      const Words six = words_set(0x3f3f3f3f);
      const Words low_four = words_set(0x0f0f0f0f);
      const Words high_two = words_set(0x30303030);
      const Words scale[2] = {a & six, (c & low_four) | (a >> 2 & high_two)};
      const Words min[2] = {b & six, (c >> 4 & low_four) | (b >> 2 & high_two)};
      const Floats minus_dmin = floats_set(0.0f) - halves(kLayout.min);
#pragma GCC unroll 8
      for (int i = 0; i < kSubBlocks; ++i) {
        scales[i] = d * byte_to_float(scale[i / 4], i % 4);
        mins[i] = minus_dmin * byte_to_float(min[i / 4], i % 4);
      }
    } else {
      scales[0] = d;
      if constexpr (kHasMin) mins[0] = halves(kLayout.min);
    }
  }

  // The codes of one sub-block, unsigned: byte i of code[g] belongs to weight 4g + i.
  LT_MEMBER void codes(int sub_block, Words (&code)[kGroups]) const {
    const Words nibble = words_set(0x0f0f0f0f);
    if constexpr (kDescriptor.codes == CodeFamily::kS8) {
      const Words sign = words_set(static_cast<int32_t>(0x80808080));
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) code[g] = word(kLayout.quants, g) ^ sign;
    } else if constexpr (kSubBlocks == 1) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups / 2; ++g) {
        const Words pair = word(kLayout.quants, g);
        code[g] = pair & nibble;
        code[g + kGroups / 2] = pair >> 4 & nibble;
      }
      if constexpr (kLayout.high_bits.bytes != 0) {
        const Words fifth = word(kLayout.high_bits, 0);
        const Words bit_four = words_set(0x10101010);
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; ++g) {
          code[g] = code[g] | ((g < 4 ? fifth << (4 - g) : fifth >> (g - 4)) & bit_four);
        }
      }
    } else if constexpr (kDescriptor.codes == CodeFamily::kU6) {
      const int half = sub_block / 4, quarter = sub_block % 4;
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) {
        const Words low = word(kLayout.quants, 16 * half + 8 * (quarter % 2) + g);
        const Words high = word(kLayout.high_bits, 8 * half + g);
        code[g] = (low >> (4 * (quarter / 2)) & nibble) |
                  ((high >> (2 * quarter) & words_set(0x03030303)) << 4);
      }
    } else {
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) {
        const Words pair = word(kLayout.quants, 8 * (sub_block / 2) + g);
        code[g] = pair >> (4 * (sub_block % 2)) & nibble;
        if constexpr (kLayout.high_bits.bytes != 0) {
          const Words fifth = word(kLayout.high_bits, g) >> sub_block;
          code[g] = code[g] | ((fifth & words_set(0x01010101)) << 4);
        }
      }
    }
  }

  // The weights of one sub-block: weight[j] is weight j of the 16 rows.
  LT_MEMBER void weights(int sub_block, Floats (&weight)[kSubBlock]) const {
    Words code[kGroups];
    codes(sub_block, code);
    const Floats zero_point = floats_set(kZeroPoint);
    for (int g = 0; g < kGroups; ++g) {
      const Floats scale = scales[(sub_block * kGroups + g) * kScalesPerSubBlock / kGroups];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Floats value = byte_to_float(code[g], i);
        if constexpr (kZeroPoint != 0) value = value - zero_point;
        // Without a minimum a plain product: adding 0 would turn -0 into 0.
        weight[4 * g + i] = kHasMin ? floats_fma(scale, value, mins[sub_block]) : scale * value;
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
};

}  // namespace LT_ISA
}  // namespace llamatelemetry
