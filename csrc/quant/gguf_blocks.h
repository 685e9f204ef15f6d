// The raw blocks of GGUF: where a weight's code and scale stand in the bytes of its block.
//
//   weight = (d * scale) * code - m * minimum
//
// Every format is read in runs of 16 consecutive weights, which share one scale and take their
// codes from 16 consecutive bytes by one shift. (d * scale) * code is exact in float32 for every
// format (at most 24 bits), so a fused multiply-add changes nothing.
// Source: gguf-py's quants.py and ggml-common.h. Blocks have no alignment: bytes only.
#pragma once

#include <cstdint>

#include "common/quant_layout.h"

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

namespace {  // internal linkage: instruction sets must not share these, see vec/isa.h

LT_BLOCK uint16_t read_u16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | (p[1] << 8)); }

LT_BLOCK int nibble(uint8_t byte, int high) { return (byte >> (4 * high)) & 15; }

// Fifth bits of Q5_0 and Q5_1: bit i of a 32-bit little-endian word belongs to weight i.
LT_BLOCK int fifth_bit(const uint8_t* word, int weight) {
  const uint32_t bits = read_u16(word) | (static_cast<uint32_t>(read_u16(word + 2)) << 16);
  return static_cast<int>((bits >> weight) & 1) << 4;
}

// Scale and minimum of 32-weight group j of Q4_K and Q5_K: six bits each, in twelve bytes.
LT_BLOCK RunScale k_scale(const uint8_t* block, int j) {
  const uint8_t* s = block + 4;
  const bool low = j < 4;
  return {read_u16(block), read_u16(block + 2),
          low ? s[j] & 63 : (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4),
          low ? s[j + 4] & 63 : (s[j + 4] >> 4) | ((s[j] >> 6) << 4)};
}

// Block<format>, format being the GGML type number: code and scale of weight 16 * run + i.
template <int kFormat>
struct Block;

template <>
struct Block<2> {
  static constexpr const char* kName = "Q4_0";
  static constexpr int kBytes = 18, kWeights = 32;
  static constexpr bool kHasMinimum = false;
  LT_BLOCK int code(const uint8_t* b, int run, int i) { return nibble(b[2 + i], run) - 8; }
  LT_BLOCK RunScale scale(const uint8_t* b, int) { return {read_u16(b), 0, 1, 0}; }
};

template <>
struct Block<3> {
  static constexpr const char* kName = "Q4_1";
  static constexpr int kBytes = 20, kWeights = 32;
  static constexpr bool kHasMinimum = true;
  LT_BLOCK int code(const uint8_t* b, int run, int i) { return nibble(b[4 + i], run); }
  LT_BLOCK RunScale scale(const uint8_t* b, int) { return {read_u16(b), read_u16(b + 2), 1, -1}; }
};

template <>
struct Block<6> {
  static constexpr const char* kName = "Q5_0";
  static constexpr int kBytes = 22, kWeights = 32;
  static constexpr bool kHasMinimum = false;
  LT_BLOCK int code(const uint8_t* b, int run, int i) {
    return (nibble(b[6 + i], run) | fifth_bit(b + 2, 16 * run + i)) - 16;
  }
  LT_BLOCK RunScale scale(const uint8_t* b, int) { return {read_u16(b), 0, 1, 0}; }
};

template <>
struct Block<7> {
  static constexpr const char* kName = "Q5_1";
  static constexpr int kBytes = 24, kWeights = 32;
  static constexpr bool kHasMinimum = true;
  LT_BLOCK int code(const uint8_t* b, int run, int i) {
    return nibble(b[8 + i], run) | fifth_bit(b + 4, 16 * run + i);
  }
  LT_BLOCK RunScale scale(const uint8_t* b, int) { return {read_u16(b), read_u16(b + 2), 1, -1}; }
};

template <>
struct Block<8> {
  static constexpr const char* kName = "Q8_0";
  static constexpr int kBytes = 34, kWeights = 32;
  static constexpr bool kHasMinimum = false;
  LT_BLOCK int code(const uint8_t* b, int run, int i) {
    return static_cast<int8_t>(b[2 + 16 * run + i]);
  }
  LT_BLOCK RunScale scale(const uint8_t* b, int) { return {read_u16(b), 0, 1, 0}; }
};

// Each 32 bytes of nibbles hold 64 weights: the low nibbles are the first 32.
template <>
struct Block<12> {
  static constexpr const char* kName = "Q4_K";
  static constexpr int kBytes = 144, kWeights = 256;
  static constexpr bool kHasMinimum = true;
  LT_BLOCK int code(const uint8_t* b, int run, int i) {
    return nibble(b[16 + 32 * (run / 4) + 16 * (run % 2) + i], (run / 2) % 2);
  }
  LT_BLOCK RunScale scale(const uint8_t* b, int run) { return k_scale(b, run / 2); }
};

// The nibbles of Q4_K, and 32 bytes of which bit j is the fifth bit in group j.
template <>
struct Block<13> {
  static constexpr const char* kName = "Q5_K";
  static constexpr int kBytes = 176, kWeights = 256;
  static constexpr bool kHasMinimum = true;
  LT_BLOCK int code(const uint8_t* b, int run, int i) {
    const int fifth = (b[16 + 16 * (run % 2) + i] >> (run / 2)) & 1;
    return nibble(b[48 + 32 * (run / 4) + 16 * (run % 2) + i], (run / 2) % 2) | (fifth << 4);
  }
  LT_BLOCK RunScale scale(const uint8_t* b, int run) { return k_scale(b, run / 2); }
};

// Per 128 weights: 64 bytes of nibbles (low ones first), 32 bytes of four 2-bit planes.
template <>
struct Block<14> {
  static constexpr const char* kName = "Q6_K";
  static constexpr int kBytes = 210, kWeights = 256;
  static constexpr bool kHasMinimum = false;
  LT_BLOCK int code(const uint8_t* b, int run, int i) {
    const int half = run / 8;
    const int low = nibble(b[64 * half + 16 * (run % 4) + i], (run % 8) / 4);
    const int high = (b[128 + 32 * half + 16 * (run % 2) + i] >> (2 * ((run % 8) / 2))) & 3;
    return (low | (high << 4)) - 32;
  }
  LT_BLOCK RunScale scale(const uint8_t* b, int run) {
    return {read_u16(b + 208), 0, static_cast<int8_t>(b[192 + run]), 0};
  }
};

}  // namespace

}  // namespace llamatelemetry
