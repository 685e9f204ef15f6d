// A weight's code and scale in the bytes of its block as the file has it (fields: format/format.h).
//
//   weight = (d * scale) * (code - zero_point) - m * minimum
//
// Every format is read in runs of 16 consecutive weights, which share one scale and, but for the
// last of ternary blocks, take their codes from 16 consecutive bytes by one shift. (d * scale) *
// code is exact in float32 for every format (at most 24 bits), so a fused multiply-add changes
// nothing. Source: gguf-py's quants.py and ggml-common.h. Blocks have no alignment: bytes only.
#pragma once

#include <cstdint>

#include "format/format.h"

#ifdef __CUDACC__
#define LT_BLOCK __host__ __device__ static inline
#else
#define LT_BLOCK static inline __attribute__((always_inline))
#endif

namespace llamatelemetry {

constexpr int kRun = 16;

struct RunScale {
  uint16_t d;   // float16 bits, or an exponent: kHasExponent
  uint16_t m;   // float16 bits, unused where the format has no minimum
  int scale;    // integer factor of d
  int minimum;  // integer factor of m
};

namespace {  // internal linkage: instruction sets must not share these, see cpu/isa.h

LT_BLOCK uint16_t read_u16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | (p[1] << 8)); }

// 2^(e - 128), subnormal for the two smallest.
LT_BLOCK float exponent_to_float(uint16_t e) {
  const uint32_t bits = e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23;
  return __builtin_bit_cast(float, bits);
}

// Digit d of the five of base 3 in a byte.
LT_BLOCK int ternary_digit(uint8_t byte, int d) {
  int fraction = byte;
  for (int i = 0; i < d; ++i) fraction = 3 * fraction & 255;
  return 3 * fraction >> 8;
}

template <int kFormat>
class Block {
  static constexpr FormatDescriptor kDescriptor = kFormats[kFormat];
  static_assert(is_decodable(kDescriptor));
  static constexpr BlockLayout kLayout = kDescriptor.fields;
  static constexpr CodeFamily kCodes = kDescriptor.codes;
  static constexpr ScaleRule kScaleRule = kDescriptor.scale_rule;
  static constexpr int kZeroPoint = kDescriptor.zero_point;
  static constexpr int kHighBits = kLayout.high_bits.offset;

 public:
  static constexpr int kBytes = kLayout.block_bytes;
  static constexpr int kWeights = kLayout.block_size;
  static constexpr bool kHasMinimum = kLayout.min.bytes > 0;
  static constexpr bool kHasExponent = kScaleRule == ScaleRule::kExponent;

  // code - zero_point of weight 16 * run + i.
  LT_BLOCK int code(const uint8_t* b, int run, int i) {
    const uint8_t* q = b + kLayout.quants.offset;
    if constexpr (kCodes == CodeFamily::kS8) {
      return static_cast<int8_t>(q[16 * run + i]) - kZeroPoint;
    } else if constexpr (kCodes == CodeFamily::kU6) {  // halves: 64 low nibbles, 64 high ones
      const int half = run / 8;
      const int two_bits = b[kHighBits + 32 * half + 16 * (run % 2) + i] >> (2 * (run % 8 / 2)) & 3;
      return (nibble(q[64 * half + 16 * (run % 4) + i], run % 8 / 4) | two_bits << 4) - kZeroPoint;
    } else if constexpr (kCodes == CodeFamily::kU2 || kCodes == CodeFamily::kU3) {  // halves
      const int low = q[32 * (run / 8) + 16 * (run % 2) + i] >> (2 * (run % 8 / 2)) & 3;
      if constexpr (kCodes == CodeFamily::kU2) return low - kZeroPoint;
      return (low | (b[kHighBits + 16 * (run % 2) + i] >> (run / 2) & 1) << 2) - kZeroPoint;
    } else if constexpr (kCodes == CodeFamily::kTernary) {
      if (run < 10) return ternary_digit(q[16 * (run % 2) + i], run / 2) - kZeroPoint;
      if (run < 15) return ternary_digit(q[32 + i], run - 10) - kZeroPoint;
      return ternary_digit(q[48 + i % 4], i / 4) - kZeroPoint;
    } else if constexpr (has_code_table(kCodes)) {
      constexpr CodeTable kTable = code_table(kCodes);
      const int index = nibble(q[16 * (run / 2) + i], run % 2);
      const uint64_t half = index < 8 ? kTable.low : kTable.high;
      return static_cast<int>(half >> (8 * (index & 7)) & 255) - code_offset(kCodes);
    } else if constexpr (kWeights == 256) {  // quarters: 32 low nibbles, 32 high ones
      const int low = nibble(q[32 * (run / 4) + 16 * (run % 2) + i], run / 2 % 2);
      if constexpr (kCodes == CodeFamily::kU4) return low - kZeroPoint;
      return (low | (b[kHighBits + 16 * (run % 2) + i] >> (run / 2) & 1) << 4) - kZeroPoint;
    } else if constexpr (kCodes == CodeFamily::kU5) {  // one word of fifth bits
      const uint8_t* high = b + kHighBits;
      const uint32_t word = read_u16(high) | static_cast<uint32_t>(read_u16(high + 2)) << 16;
      const int fifth = static_cast<int>(word >> (16 * run + i) & 1) << 4;
      return (nibble(q[i], run) | fifth) - kZeroPoint;
    } else {
      return nibble(q[i], run) - kZeroPoint;
    }
  }

  LT_BLOCK RunScale scale(const uint8_t* b, int run) {
    const uint8_t* scale = b + kLayout.scale.offset;
    if constexpr (kHasExponent) return {*scale, 0, 1, 0};
    const uint16_t d = read_u16(scale);
    const uint16_t m = kHasMinimum ? read_u16(b + kLayout.min.offset) : 0;
    const uint8_t* s = b + kLayout.sub_scales.offset;
    if constexpr (kScaleRule == ScaleRule::kSubBlock16) {
      return {d, m, static_cast<int8_t>(s[run]), 0};
    } else if constexpr (kScaleRule == ScaleRule::kSubBlock16Four) {
      return {d, m, s[run] & 15, s[run] >> 4};
    } else if constexpr (kScaleRule == ScaleRule::kSubBlock16Six) {
      const int high = s[8 + run % 4] >> (2 * (run / 4)) & 3;
      return {d, m, (nibble(s[run % 8], run / 8) | high << 4) - 32, 0};
    } else if constexpr (kScaleRule == ScaleRule::kSubBlock32Six) {
      const int sub_block = run / 2;
      const int high = read_u16(b + kLayout.sub_scales_high.offset) >> (2 * sub_block) & 3;
      return {d, m, (nibble(s[sub_block / 2], sub_block % 2) | high << 4) - 32, 0};
    } else if constexpr (kScaleRule == ScaleRule::kSubBlock32) {
      const int j = run / 2 % 4;  // sub-blocks 4 to 7 borrow the top bits of 0 to 3
      if (run < 8) return {d, m, s[j] & 63, s[j + 4] & 63};
      return {d, m, (s[j + 8] & 15) | (s[j] >> 6 << 4), (s[j + 8] >> 4) | (s[j + 4] >> 6 << 4)};
    } else {
      return {d, m, 1, -1};  // this rule adds the minimum
    }
  }

 private:
  LT_BLOCK int nibble(uint8_t byte, int high) { return byte >> (4 * high) & 15; }
};

}  // namespace

}  // namespace llamatelemetry
