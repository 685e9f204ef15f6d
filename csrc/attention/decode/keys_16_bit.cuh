// Keys and values as queries are stored, float16 or bfloat16: tiles in shared memory, and the
// products of a warp over its 16 keys.
#pragma once

#include <type_traits>

#include "attention/decode/config.h"
#include "ptx/shared.cuh"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"
#include "tile/swizzled_tile.cuh"

namespace llamatelemetry::decode {

template <typename T, Config kConfig>
struct Keys16Bit {
  using Element = T;  // as it lies in memory
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kDimSteps = kHeadDim / 16;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr bool kHasScales = false;
  using Tile = SwizzledTile<kHeadDim>;
  static constexpr int kRowChunks = Tile::kChunks;  // of 16 bytes
  static __device__ uint32_t offset(int row, int chunk) { return Tile::offset(row, chunk); }

  using Mma = std::conditional_t<(kConfig.capability >= 80), MmaSm80, MmaSm75>;
  using Rows = char[Tile::bytes(kWarpKeys)];

  struct Both {
    Rows k, v;
  };
  union Either {
    Rows k, v;
  };
  using Stage = std::conditional_t<kConfig.copies_by_registers(), Either, Both>;
  struct Scales {};

  // Fragments of the queries in registers, or the address of this lane's in shared memory.
  struct Queries {
    uint32_t held[kConfig.queries_in_registers ? kDimSteps : 1][4];
    uint32_t address;

    __device__ void fragment(int step, uint32_t (&a)[4]) const {
      if constexpr (kConfig.queries_in_registers) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = held[step][i];
      } else {
        ptx::ldmatrix_x4(a, Tile::advance(address, 2 * step));
      }
    }
  };

  // row_of(row): where a row of the tile lies, or nullptr. Every thread of the block calls it.
  template <typename RowOf>
  static __device__ void load_queries(RowOf row_of, int head_dim, char* s_queries, Queries& q) {
    if constexpr (kConfig.queries_in_registers) {
      const int lane = threadIdx.x % kWarpSize;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* from = row_of(lane / 4 + 8 * half);
#pragma unroll
        for (int i = 0; i < 2 * kDimSteps; ++i) {
          const int column = 8 * i + lane % 4 * 2;
          q.held[i / 2][half + i % 2 * 2] = from != nullptr && column < head_dim
                                                ? *reinterpret_cast<const uint32_t*>(from + column)
                                                : 0;
        }
      }
    } else {
      for (int i = threadIdx.x; i < kRowTile * Tile::kChunks; i += kNumThreads) {
        const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
        const int column = chunk * Tile::kChunkElements;
        const T* from = row_of(row);
        *reinterpret_cast<uint4*>(s_queries + Tile::offset(row, chunk)) =
            from != nullptr && column < head_dim ? *reinterpret_cast<const uint4*>(from + column)
                                                 : uint4{};
      }
      __syncthreads();
      q.address = ptx::shared_address(s_queries) + Tile::a_offset(threadIdx.x % kWarpSize);
    }
  }

  // Adds to scores. Tensor cores cut each sum off towards zero, with m16n8k8 twice as often as with
  // m16n8k16: there the sum of each step is rounded to nearest as it is added.
  static __device__ Scales multiply_keys(const Queries& q, const Stage& stage,
                                         float (&scores)[2][4]) {
    const uint32_t keys = ptx::shared_address(stage.k) + Tile::b_offset(threadIdx.x % kWarpSize);
#pragma unroll
    for (int step = 0; step < kDimSteps; ++step) {
      uint32_t a[4], b[4];
      q.fragment(step, a);
      ptx::ldmatrix_x4(b, Tile::advance(keys, 2 * step));
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        if constexpr (kConfig.capability >= 80) {
          Mma::template add<T>(scores[t], a, b[2 * t], b[2 * t + 1]);
        } else {
          float sum[4] = {};
          Mma::template add<T>(sum, a, b[2 * t], b[2 * t + 1]);
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[t][i] += sum[i];
        }
      }
    }
    return {};
  }
  static __device__ void multiply_values(const float (&weights)[2][4], const Stage& stage,
                                         float (&o)[2 * kDimSteps][4]) {
    uint32_t a[4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      a[2 * t] = pack_two(weights[t][0], weights[t][1], T{});
      a[2 * t + 1] = pack_two(weights[t][2], weights[t][3], T{});
    }
    const uint32_t values =
        ptx::shared_address(stage.v) + Tile::b_trans_offset(threadIdx.x % kWarpSize);
#pragma unroll
    for (int step = 0; step < kDimSteps; ++step) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, Tile::advance(values, 2 * step));
      Mma::template add<T>(o[2 * step], a, b[0], b[1]);
      Mma::template add<T>(o[2 * step + 1], a, b[2], b[3]);
    }
  }

  // Adds a row of this lane's share of o, times factor, to to[c] for each column c.
  static __device__ void add_row(const float (&o)[2 * kDimSteps][4], int half, float factor,
                                 float* to) {
#pragma unroll
    for (int t = 0; t < 2 * kDimSteps; ++t) {
      auto& sum = *reinterpret_cast<float2*>(to + 8 * t + threadIdx.x % 4 * 2);
      sum = {sum.x + o[t][2 * half] * factor, sum.y + o[t][2 * half + 1] * factor};
    }
  }
  // Stores such a row.
  static __device__ void store_row(const float (&o)[2 * kDimSteps][4], int half, float* to) {
#pragma unroll
    for (int t = 0; t < 2 * kDimSteps; ++t) {
      *reinterpret_cast<float2*>(to + 8 * t + threadIdx.x % 4 * 2) = {o[t][2 * half],
                                                                      o[t][2 * half + 1]};
    }
  }
};

}  // namespace llamatelemetry::decode
