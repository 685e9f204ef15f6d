// Decodes packed weights (format/layout.h) into float, exactly as dequantize does.
#pragma once

#include <cstdint>

#include "format/format.h"
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

// Word `word` of the quants of a packed block, for rows row .. row + kRows - 1: kParts groups of
// four consecutive weights in each row, whose first one is first_weight(word, part) of its block.
template <int kFormat, int kRows>
class PackedWord {
 public:
  static constexpr FormatDescriptor kDescriptor = kFormats[kFormat];
  static_assert(is_decodable(kDescriptor));
  static constexpr BlockLayout kLayout = block_layout(kFormat);
  static constexpr bool kByteCodes = kDescriptor.codes == CodeFamily::kS8;
  static constexpr bool kSixBits = kDescriptor.codes == CodeFamily::kU6;
  static constexpr bool kFiveBits = kDescriptor.codes == CodeFamily::kU5;
  static constexpr bool kFifthInOneWord = kFiveBits && has_fifth_bits_word(kLayout);
  static constexpr bool kHasMin = kLayout.min.bytes > 0;
  static constexpr int kQuants = kLayout.quants.packed;
  static constexpr int kHighBits = kLayout.high_bits.packed;
  static constexpr int kSubScales = kLayout.sub_scales.packed;
  static constexpr int kScale = kLayout.scale.packed;
  static constexpr int kMin = kLayout.min.packed;
  static constexpr int kOffset = unsigned_zero_point(kDescriptor);
  static constexpr int kBlockSize = kLayout.block_size;
  static constexpr int kPackedBytes = kTileRows * kLayout.block_bytes;
  static constexpr int kWordsPerBlock = kLayout.quants.bytes / 4;
  static constexpr int kParts = kByteCodes ? 1 : 2;

  static __device__ int first_weight(int word, int part) {
    if constexpr (kByteCodes) return 4 * word;
    if constexpr (kBlockSize == 32) return 4 * word + 16 * part;
    return 32 * sub_block(word, part) + 4 * (word % 8);
  }

  __device__ PackedWord(const uint8_t* block, int word, int row) : word_(word) {
    quants_ = load_row_units<uint32_t, kRows>(block + kQuants, word, row);
    if constexpr (kFifthInOneWord) {
      high_bits_ = load_row_units<uint32_t, kRows>(block + kHighBits, 0, row);
    } else if constexpr (kFiveBits) {
      high_bits_ = load_row_units<uint32_t, kRows>(block + kHighBits, word % 8, row);
    } else if constexpr (kSixBits) {
      high_bits_ =
          load_row_units<uint32_t, kRows>(block + kHighBits, word / 16 * 8 + word % 8, row);
    }
    const auto scale = load_row_units<uint16_t, kRows>(block + kScale, 0, row);
    RowUnits<uint16_t, kRows> min;
    if constexpr (kHasMin) min = load_row_units<uint16_t, kRows>(block + kMin, 0, row);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      int scale_factor[kRows], min_factor[kRows];
      sub_scales(block, row, part, scale_factor, min_factor);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scale_[part][r] = half_bits_to_float(scale.row[r]) * static_cast<float>(scale_factor[r]);
        if constexpr (kHasMin) {
          min_[part][r] = half_bits_to_float(min.row[r]) * static_cast<float>(min_factor[r]);
        }
      }
    }
  }

  // Half of the bytes of words `word` and `word + 2`, which selector of __byte_perm picks, as one:
  // the group of a part is then made of two half groups, 8 weights apart.
  __device__ PackedWord(const uint8_t* block, int word, int row, uint32_t selector)
      : PackedWord(block, word, row) {
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
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float product = scale_[part][r] * byte_to_float(codes, i, kOffset);
      weights[i] = kHasMin ? product - min_[part][r] : product;
    }
  }

  // Likewise by a permutation of bytes and a fused multiply-add for each weight; only the sign of a
  // zero can differ. A code becomes the mantissa of a float: of 128 if it has at most 7 bits, else
  // of 2^15. Either has so few bits that its product with the scale and the zero point is exact.
  __device__ void decode_fused(int part, int r, float (&weights)[4]) const {
    const uint32_t codes = this->codes(part, r);
    const float scale = scale_[part][r];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kHasMin) {
        weights[i] = __fmaf_rn(scale, byte_to_float(codes, i, kOffset), -min_[part][r]);
      } else if constexpr (kByteCodes) {
        const float shifted = __uint_as_float(__byte_perm(codes, 0x47000000, 0x7404 + 0x10 * i));
        weights[i] = __fmaf_rn(shifted, scale, -(32768.0f + kOffset) * scale);
      } else {
        const float shifted = __uint_as_float(__byte_perm(codes, 0x43000000, 0x7044 + 0x100 * i));
        weights[i] = __fmaf_rn(shifted, scale, -(128.0f + kOffset) * scale);
      }
    }
  }

  __device__ float scale(int part, int r) const { return scale_[part][r]; }
  __device__ float min(int part, int r) const { return min_[part][r]; }

  // The codes of a group, one in each byte; kOffset is to be subtracted.
  __device__ uint32_t codes(int part, int r) const {
    const uint32_t quants = quants_.row[r];
    if constexpr (kByteCodes) return quants ^ 0x80808080;
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
  // In blocks of 256: the sub-block of 32 weights that a part of a word belongs to.
  static __device__ int sub_block(int word, int part) {
    if constexpr (kSixBits) return word / 16 * 4 + word / 8 % 2 + 2 * part;
    return word / 8 * 2 + part;
  }

  // The integers that scale and min of the block are multiplied with.
  __device__ void sub_scales(const uint8_t* block, int row, int part, int (&scale)[kRows],
                             int (&min)[kRows]) const {
    if constexpr (kDescriptor.scale_rule == ScaleRule::kSubBlock32) {
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
    } else if constexpr (kDescriptor.scale_rule == ScaleRule::kSubBlock16) {
      const int sixteen = 2 * sub_block(word_, part) + word_ % 8 / 4;
      const auto words = load_row_units<uint32_t, kRows>(block + kSubScales, sixteen / 4, row);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        scale[r] = static_cast<int8_t>(words.row[r] >> (8 * (sixteen % 4)));
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
  float scale_[kParts][kRows];
  float min_[kParts][kRows];
};

}  // namespace llamatelemetry
