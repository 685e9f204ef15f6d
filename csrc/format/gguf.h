// A weight's code and scale in the bytes of its raw GGUF block (fields: format/layout.h).
//
//   weight = (d * scale) * code - m * minimum
//
// Every format is read in runs of 16 consecutive weights, which share one scale and take their
// codes from 16 consecutive bytes by one shift. (d * scale) * code is exact in float32 for every
// format (at most 24 bits), so a fused multiply-add changes nothing.
// Source: gguf-py's quants.py and ggml-common.h. Blocks have no alignment: bytes only.
#pragma once

#include <cstdint>

#include "format/layout.h"

#ifdef __CUDACC__
#define LT_BLOCK __host__ __device__ static inline
#else
#define LT_BLOCK static inline __attribute__((always_inline))
#endif

namespace llamatelemetry {

constexpr int kRun = 16;

struct RunScale {
  uint16_t d;   // float16 bits
  uint16_t m;   // float16 bits, unused where the format has no minimum
  int scale;    // integer factor of d
  int minimum;  // integer factor of m
};

namespace {  // internal linkage: instruction sets must not share these, see cpu/isa.h

LT_BLOCK uint16_t read_u16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | (p[1] << 8)); }

template <int kFormat>
class Block {
  static constexpr bool kSixBitScales = kFormat == kQ4_K || kFormat == kQ5_K;
  static constexpr int kQuants = quant_layout(kFormat).quants.offset;
  static constexpr int kHighBits = quant_layout(kFormat).high_bits.offset;
  static constexpr int kSubScales = quant_layout(kFormat).sub_scales.offset;
  static constexpr int kScale = quant_layout(kFormat).scale.offset;
  static constexpr int kMin = quant_layout(kFormat).min.offset;

 public:
  static constexpr int kBytes = quant_layout(kFormat).block_bytes;
  static constexpr int kWeights = quant_layout(kFormat).block_size;
  static constexpr bool kHasMinimum = quant_layout(kFormat).min.bytes > 0;

  // Of weight 16 * run + i.
  LT_BLOCK int code(const uint8_t* b, int run, int i) {
    const uint8_t* q = b + kQuants;
    if constexpr (kFormat == kQ8_0) {
      return static_cast<int8_t>(q[16 * run + i]);
    } else if constexpr (kFormat == kQ6_K) {  // halves of 64 bytes: 64 low nibbles, 64 high ones
      const int half = run / 8;
      const int two_bits = b[kHighBits + 32 * half + 16 * (run % 2) + i] >> (2 * (run % 8 / 2)) & 3;
      return (nibble(q[64 * half + 16 * (run % 4) + i], run % 8 / 4) | two_bits << 4) - 32;
    } else if constexpr (kSixBitScales) {  // quarters of 32 bytes: 32 low nibbles, 32 high ones
      const int low = nibble(q[32 * (run / 4) + 16 * (run % 2) + i], run / 2 % 2);
      if constexpr (kFormat == kQ4_K) return low;
      return low | (b[kHighBits + 16 * (run % 2) + i] >> (run / 2) & 1) << 4;
    } else if constexpr (kFormat == kQ5_0 || kFormat == kQ5_1) {  // one word of fifth bits
      const uint8_t* high = b + kHighBits;
      const uint32_t word = read_u16(high) | static_cast<uint32_t>(read_u16(high + 2)) << 16;
      const int fifth = static_cast<int>(word >> (16 * run + i) & 1) << 4;
      return (nibble(q[i], run) | fifth) - (kFormat == kQ5_0 ? 16 : 0);
    } else {
      return nibble(q[i], run) - (kFormat == kQ4_0 ? 8 : 0);
    }
  }

  LT_BLOCK RunScale scale(const uint8_t* b, int run) {
    const uint16_t d = read_u16(b + kScale);
    const uint16_t m = kHasMinimum ? read_u16(b + kMin) : 0;
    const uint8_t* s = b + kSubScales;
    if constexpr (kFormat == kQ6_K) {
      return {d, m, static_cast<int8_t>(s[run]), 0};
    } else if constexpr (kSixBitScales) {
      const int j = run / 2 % 4;  // sub-blocks 4 to 7 borrow the top bits of 0 to 3
      if (run < 8) return {d, m, s[j] & 63, s[j + 4] & 63};
      return {d, m, (s[j + 8] & 15) | (s[j] >> 6 << 4), (s[j + 8] >> 4) | (s[j + 4] >> 6 << 4)};
    } else {
      return {d, m, 1, -1};  // these formats add their minimum
    }
  }

 private:
  LT_BLOCK int nibble(uint8_t byte, int high) { return byte >> (4 * high) & 15; }
};

}  // namespace

}  // namespace llamatelemetry
