// Scales, and zero points or minima, of the two rows of a lane in quant_stream.cuh: as they are
// loaded with an item, and decoded when it is multiplied. scale(i, row) is that of the i-th sum of
// the item; zero is what else is subtracted from the codes, min what is subtracted from products.
#pragma once

#include <cstdint>

#include "format/decode.cuh"
#include "ptx/nibbles.cuh"

namespace llamatelemetry {

// Tensors beside the blocks.
template <int kSums, bool kHasZeros>
struct StreamGroups {
  float2 scales[kSums];
  uint16_t zeros[kHasZeros ? kSums : 1];

  // Of the tile and the lane's rows; shift: log2 of the runs in a group.
  __device__ void load(const float* tile_scales, const uint8_t* tile_zeros, int first_run,
                       int runs_of_sum, int shift) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int at = (first_run + i * runs_of_sum >> shift) * kTileRows;
      const uint2 bits = ptx::load_streamed_8(tile_scales + at);
      scales[i] = float2{__uint_as_float(bits.x), __uint_as_float(bits.y)};
      if constexpr (kHasZeros) zeros[i] = *reinterpret_cast<const uint16_t*>(tile_zeros + at);
    }
  }
  __device__ const StreamGroups& decoded() const { return *this; }
  __device__ float scale(int i, int row) const { return row == 0 ? scales[i].x : scales[i].y; }
  __device__ float zero(int i, int row) const {
    return static_cast<float>(zeros[i] >> (8 * row) & 0xff);
  }
};

// float16 in each block of 32 weights.
template <int kSums, bool kHasMin>
struct StreamBlocks {
  uint32_t scales[kSums];
  uint32_t mins[kHasMin ? kSums : 1];

  template <typename Word>
  __device__ void load(const uint8_t* blocks, int group) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const uint8_t* block = blocks + i * Word::kPackedBytes + 4 * group;
      scales[i] = *reinterpret_cast<const uint32_t*>(block + Word::kScale);
      if constexpr (kHasMin) mins[i] = *reinterpret_cast<const uint32_t*>(block + Word::kMin);
    }
  }
  __device__ const StreamBlocks& decoded() const { return *this; }
  __device__ float scale(int i, int row) const {
    return half_bits_to_float(static_cast<uint16_t>(scales[i] >> (16 * row)));
  }
  // The rule of the blocks is to add it.
  __device__ float min(int i, int row) const {
    return -half_bits_to_float(static_cast<uint16_t>(mins[i] >> (16 * row)));
  }
};

// An exponent in each block of 32 weights: ScaleRule::kExponent.
template <int kSums>
struct StreamExponents {
  uint16_t exponents[kSums];

  template <typename Word>
  __device__ void load(const uint8_t* blocks, int group) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const uint8_t* block = blocks + i * Word::kPackedBytes + 2 * group;
      exponents[i] = *reinterpret_cast<const uint16_t*>(block + Word::kScale);
    }
  }
  __device__ const StreamExponents& decoded() const { return *this; }
  __device__ float scale(int i, int row) const {
    return exponent_bits_to_float(exponents[i] >> (8 * row) & 0xff);
  }
};

// Six-bit scales of 8 sub-blocks, less 32, times a float16 of the block: ScaleRule::kSubBlock32Six.
struct StreamSixes {
  uint2 low;  // four bits each
  uint32_t high;
  uint32_t unit;

  template <typename Word>
  __device__ void load(const uint8_t* block, int group) {
    low = ptx::load_streamed_8(block + Word::kSubScales + 8 * group);
    high = *reinterpret_cast<const uint32_t*>(block + Word::kSubScalesHigh + 4 * group);
    unit = *reinterpret_cast<const uint32_t*>(block + Word::kScale + 4 * group);
  }
  __device__ const StreamSixes& decoded() const { return *this; }
  __device__ float scale(int i, int row) const {
    const uint32_t four = (row == 0 ? low.x : low.y) >> (4 * i) & 15;
    const uint32_t two = high >> (16 * row + 2 * i) & 3;
    return half_bits_to_float(static_cast<uint16_t>(unit >> (16 * row))) *
           static_cast<float>(static_cast<int>(four | two << 4) - 32);
  }
};

// Six-bit scales and minima of 8 sub-blocks, times a float16 of the block: ScaleRule::kSubBlock32.
struct StreamSubBlocks {
  uint2 words[3];
  uint32_t scale, min;

  template <typename Word>
  __device__ void load(const uint8_t* block, int group) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      words[i] = ptx::load_streamed_8(block + Word::kSubScales + i * 4 * kTileRows + 8 * group);
    }
    scale = *reinterpret_cast<const uint32_t*>(block + Word::kScale + 4 * group);
    min = *reinterpret_cast<const uint32_t*>(block + Word::kMin + 4 * group);
  }

  struct Decoded {
    uint32_t scales[2][2], mins[2][2];  // [row][sub-blocks 0 to 3, 4 to 7]
    float scale_unit[2], min_unit[2];

    __device__ float scale(int i, int row) const {
      return times(scales[row][i / 4], i % 4, scale_unit[row]);
    }
    __device__ float min(int i, int row) const {
      return times(mins[row][i / 4], i % 4, min_unit[row]);
    }
    // Exact: the byte is the low end of the mantissa of 2^23.
    static __device__ float times(uint32_t bytes, int i, float unit) {
      const float shifted = __uint_as_float(__byte_perm(bytes, 0x4b000000, 0x7650 + i));
      return fmaf(shifted, unit, -8388608.0f * unit);
    }
  };
  __device__ Decoded decoded() const {
    Decoded to;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint32_t a = row == 0 ? words[0].x : words[0].y;
      const uint32_t b = row == 0 ? words[1].x : words[1].y;
      const uint32_t c = row == 0 ? words[2].x : words[2].y;
      to.scales[row][0] = a & 0x3f3f3f3f;
      to.mins[row][0] = b & 0x3f3f3f3f;
      to.scales[row][1] = (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030);
      to.mins[row][1] = (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030);
      to.scale_unit[row] = half_bits_to_float(static_cast<uint16_t>(scale >> (16 * row)));
      to.min_unit[row] = half_bits_to_float(static_cast<uint16_t>(min >> (16 * row)));
    }
    return to;
  }
};

// int8 scales of 16 weights each, times a float16 of the block: ScaleRule::kSubBlock16.
struct StreamSixteens {
  uint2 words[4];
  uint32_t scale;

  template <typename Word>
  __device__ void load(const uint8_t* block, int group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = ptx::load_streamed_8(block + Word::kSubScales + i * 4 * kTileRows + 8 * group);
    }
    scale = *reinterpret_cast<const uint32_t*>(block + Word::kScale + 4 * group);
  }

  struct Decoded {
    uint32_t bytes[2][4];  // [row][of 16 * 4 weights], each + 128
    float unit[2];

    // Exact: the byte is in the mantissa of 2^15, and 2^15 + 128 times unit has 20 bits.
    __device__ float scale(int i, int row) const {
      const uint32_t bits = __byte_perm(bytes[row][i / 4], 0x47000000, 0x7404 + 0x10 * (i % 4));
      return fmaf(__uint_as_float(bits), unit[row], -32896.0f * unit[row]);
    }
  };
  __device__ Decoded decoded() const {
    Decoded to;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to.bytes[0][i] = words[i].x ^ 0x80808080;
      to.bytes[1][i] = words[i].y ^ 0x80808080;
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      to.unit[row] = half_bits_to_float(static_cast<uint16_t>(scale >> (16 * row)));
    }
    return to;
  }
};

}  // namespace llamatelemetry
