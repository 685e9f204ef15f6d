// Keys and values of 8 bits, a scale for each: tiles in shared memory as they lie in memory, and
// the products of a warp over its 16 keys, in float16 whatever the queries are.
//
// Products sum over columns and keys in any order, so a lane takes for its fragments what lies side
// by side: 16 columns of a key, 8 columns of each of 4 values; converted in registers. A scale of
// a key multiplies its scores, that of a value its weights.
// Queries of bfloat16 take a power of two a row along, as float16 has fewer exponents.
#pragma once

#include <type_traits>

#include "attention/decode/eight_bit.cuh"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"
#include "tile/swizzled_tile.cuh"

namespace llamatelemetry::decode {

template <typename T, Config kConfig>
struct Keys8Bit {
  using Element = int8_t;  // any byte
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kDimSteps = kHeadDim / 16;
  static constexpr bool kHasScales = true;
  using Convert = EightBit<kConfig.stored>;
  static constexpr int kRowChunks = kHeadDim / 16;  // of 16 bytes
  // A tile is planes of 64 columns; in a plane two rows are a line of all banks, whose chunks trade
  // places so that the rows and columns that lanes load at once lie in different banks.
  static constexpr int kPlaneColumns = 64;
  static constexpr int kPlanes = kHeadDim / kPlaneColumns;
  static constexpr int kPlaneBytes = kWarpKeys * kPlaneColumns;
  static constexpr int kLineBytes = 128;
  static __device__ uint32_t offset(int row, int chunk) {
    const int plane = chunk / 4, line = row / 2;
    const int place = ((row + plane) % 2 * 4 + chunk % 4) ^ (line % 4 * 2);
    return plane * kPlaneBytes + line * kLineBytes + place * 16;
  }
  // Columns of queries and results that a lane has in a plane: kLaneColumns from lane % 4 of them.
  static constexpr int kLaneColumns = 16;

  struct Stage {
    char k[kPlanes * kPlaneBytes];
    char v[kPlanes * kPlaneBytes];
    float scales[2][kWarpKeys];  // of keys, of values
  };
  // Of the values that a lane weights, at columns 8t + lane % 4 * 2 + e of a score's fragment, and
  // their exponents.
  struct Scales {
    float value[2][2];
    float exponent[2][2];
  };

  static constexpr int kRowPitch = 2 * kHeadDim + 8;  // bytes: rows start in different banks
  struct Queries {
    uint32_t held[kConfig.queries_in_registers ? kDimSteps : 1][4];
    const char* rows;  // of this lane, where they are shared
    float scale[2];    // by which products of rows lane / 4 and lane / 4 + 8 are multiplied

    __device__ void fragment(int step, uint32_t (&a)[4]) const {
      if constexpr (kConfig.queries_in_registers) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = held[step][i];
      } else {
        const char* from = rows + step / 4 * (2 * kPlaneColumns) + step % 4 * 8;
        const uint2 first = *reinterpret_cast<const uint2*>(from);
        const uint2 second = *reinterpret_cast<const uint2*>(from + 8 * kRowPitch);
        a[0] = first.x;
        a[1] = second.x;
        a[2] = first.y;
        a[3] = second.y;
      }
    }
  };

  // ---- Queries ----

  static constexpr bool kScalesQueries = std::is_same_v<T, BFloat16>;
  // The power of two that brings a row's largest number to [1, 2); its inverse.
  static __device__ float factor_of(float largest, float* inverse) {
    const int exponent = min(max(__float_as_int(largest) >> 23, 1), 253);
    const bool is_finite = largest < INFINITY;
    *inverse = is_finite ? __int_as_float(exponent << 23) : 1.0f;
    return is_finite ? __int_as_float((254 - exponent) << 23) : 1.0f;
  }
  static __device__ float larger(uint32_t two, float than) {
    const float low = __uint_as_float(two << 16), high = __uint_as_float(two & 0xffff0000);
    return fmaxf(than, fmaxf(fabsf(low), fabsf(high)));
  }
  static __device__ uint32_t scaled(uint32_t two, float factor) {
    const float low = __uint_as_float(two << 16), high = __uint_as_float(two & 0xffff0000);
    return pack_two(low * factor, high * factor, Half{});
  }

  template <typename RowOf>
  static __device__ void load_queries(RowOf row_of, int head_dim, char* s_queries, Queries& q) {
    if constexpr (kConfig.queries_in_registers) {
      hold_queries(row_of, head_dim, q);
    } else {
      share_queries(row_of, head_dim, s_queries, q);
    }
  }

  // Step s of a plane takes columns 4s to 4s + 3 of a lane's.
  template <typename RowOf>
  static __device__ void hold_queries(RowOf row_of, int head_dim, Queries& q) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* from = row_of(lane / 4 + 8 * half);
      uint4 raw[kPlanes][2];
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < 2 * kPlanes; ++i) {
        const int column = i / 2 * kPlaneColumns + lane % 4 * kLaneColumns + i % 2 * 8;
        uint4& x = raw[i / 2][i % 2];
        x = from != nullptr && column < head_dim ? *reinterpret_cast<const uint4*>(from + column)
                                                 : uint4{};
        largest = larger(x.w, larger(x.z, larger(x.y, larger(x.x, largest))));
      }
      float factor = 1.0f;
      q.scale[half] = 1.0f;
      if constexpr (kScalesQueries) factor = factor_of(quad_reduce<Max>(largest), &q.scale[half]);
#pragma unroll
      for (int i = 0; i < 2 * kPlanes; ++i) {
        const uint4& x = raw[i / 2][i % 2];
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          q.held[2 * i + w / 2][half + w % 2 * 2] =
              kScalesQueries ? scaled(words[w], factor) : words[w];
        }
      }
    }
  }

  // Eight threads a row.
  template <typename RowOf>
  static __device__ void share_queries(RowOf row_of, int head_dim, char* s_queries, Queries& q) {
    static_assert(kNumWarps * kWarpSize == 8 * kRowTile);
    const int row = threadIdx.x / 8, lane = threadIdx.x % kWarpSize;
    auto* s_scales = reinterpret_cast<float*>(s_queries + kRowTile * kRowPitch);
    const T* from = row_of(row);
    uint4 raw[kPlanes];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kPlanes; ++i) {
      const int column = i * kPlaneColumns + threadIdx.x % 8 * 8;
      uint4& x = raw[i];
      x = from != nullptr && column < head_dim ? *reinterpret_cast<const uint4*>(from + column)
                                               : uint4{};
      largest = larger(x.w, larger(x.z, larger(x.y, larger(x.x, largest))));
    }
    float factor = 1.0f, inverse = 1.0f;
    if constexpr (kScalesQueries) factor = factor_of(warp_reduce<Max, 8>(largest), &inverse);
    if (threadIdx.x % 8 == 0) s_scales[row] = inverse;
#pragma unroll
    for (int i = 0; i < kPlanes; ++i) {
      uint4& x = raw[i];
      if constexpr (kScalesQueries) {
        x = {scaled(x.x, factor), scaled(x.y, factor), scaled(x.z, factor), scaled(x.w, factor)};
      }
      auto* to = reinterpret_cast<uint2*>(s_queries + row * kRowPitch +
                                          (i * kPlaneColumns + threadIdx.x % 8 * 8) * 2);
      to[0] = {x.x, x.y};
      to[1] = {x.z, x.w};
    }
    __syncthreads();
    q.rows = s_queries + lane / 4 * kRowPitch + lane % 4 * (2 * kLaneColumns);
    q.scale[0] = s_scales[lane / 4];
    q.scale[1] = s_scales[lane / 4 + 8];
  }

  // ---- Products ----

  static __device__ Scales multiply_keys(const Queries& q, const Stage& stage,
                                         float (&scores)[2][4]) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      uint32_t keys[2][4];  // of columns 8t + lane / 4 of the scores, 16 of the plane's columns
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const uint4 x = *reinterpret_cast<const uint4*>(
            stage.k + offset(8 * t + lane / 4, 4 * plane + lane % 4));
        keys[t][0] = Convert::prepared(x.x);
        keys[t][1] = Convert::prepared(x.y);
        keys[t][2] = Convert::prepared(x.z);
        keys[t][3] = Convert::prepared(x.w);
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t a[4];
        q.fragment(4 * plane + step, a);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          MmaSm80::add<Half>(scores[t], a, Convert::pair(keys[t][step], false),
                             Convert::pair(keys[t][step], true));
        }
      }
    }
    return scale_scores(q, stage, scores);
  }

  static __device__ Scales scale_scores(const Queries& q, const Stage& stage,
                                        float (&scores)[2][4]) {
    // A value's scale as small as this counts as 0 beside others; so its exponent is a number.
    constexpr float kLeast = 0x1p-110f;
    Scales scales;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int key = 8 * t + threadIdx.x % 4 * 2;
      const float2 of_keys = *reinterpret_cast<const float2*>(&stage.scales[0][key]);
      const float2 of_values = *reinterpret_cast<const float2*>(&stage.scales[1][key]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float of_key = e == 0 ? of_keys.x : of_keys.y;
        scores[t][e] *= of_key;
        scores[t][e + 2] *= of_key;
        if constexpr (kScalesQueries) {
          scores[t][e] *= q.scale[0];
          scores[t][e + 2] *= q.scale[1];
        }
        const float of_value = e == 0 ? of_values.x : of_values.y;
        scales.value[t][e] = of_value < kLeast ? kLeast : of_value;  // a NaN stays
        scales.exponent[t][e] =
            static_cast<float>((__float_as_int(scales.value[t][e]) >> 23 & 0xff) - 127);
      }
    }
    return scales;
  }

  static __device__ void multiply_values(const float (&weights)[2][4], const Stage& stage,
                                         float (&o)[2 * kDimSteps][4]) {
    const int lane = threadIdx.x % kWarpSize;
    uint32_t a[4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      a[2 * t] = pack_two(weights[t][0], weights[t][1], Half{});
      a[2 * t + 1] = pack_two(weights[t][2], weights[t][3], Half{});
    }
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      uint2 values[2][2];  // of keys 8t + lane % 4 * 2 + e, columns 8 (lane / 4) to + 7 of a plane
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = i / 2 * 8 + lane % 4 * 2 + i % 2;
        values[i / 2][i % 2] = *reinterpret_cast<const uint2*>(
            stage.v + offset(key, 4 * plane + lane / 8) + lane / 4 % 2 * 8);
      }
#pragma unroll
      for (int word = 0; word < 2; ++word) {  // four columns
        uint32_t b[2][4];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const uint32_t first = Convert::prepared(word ? values[t][0].y : values[t][0].x);
          const uint32_t second = Convert::prepared(word ? values[t][1].y : values[t][1].x);
          const uint32_t low = __byte_perm(first, second, 0x5140);  // of both keys side by side
          const uint32_t high = __byte_perm(first, second, 0x7362);
          b[t][0] = Convert::pair(low, false);
          b[t][1] = Convert::pair(low, true);
          b[t][2] = Convert::pair(high, false);
          b[t][3] = Convert::pair(high, true);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          MmaSm80::add<Half>(o[8 * plane + 4 * word + c], a, b[0][c], b[1][c]);
        }
      }
    }
  }

  // A row of this lane's share of o: to[c] for each column c. Product n of a plane has its columns
  // 8j + n at fragment column j.
  static __device__ void store_row(const float (&o)[2 * kDimSteps][4], int half, float* to) {
#pragma unroll
    for (int i = 0; i < 4 * kPlanes; ++i) {
      const int plane = i / 4, e = i / 2 % 2, first = 8 * plane + i % 2 * 4;
      const int column = plane * kPlaneColumns + threadIdx.x % 4 * kLaneColumns + 8 * e + i % 2 * 4;
      const int at = 2 * half + e;
      *reinterpret_cast<float4*>(to + column) = {o[first][at], o[first + 1][at], o[first + 2][at],
                                                 o[first + 3][at]};
    }
  }
};

}  // namespace llamatelemetry::decode
