// out = a . b^T by mma.sync: 128 x 128 of out a block, 64 x 32 a warp, operands in shared memory as
// rows of 128 bytes along k, or, where they come transposed, as rows along m or n that the matrix
// loads turn round. sm_80: a ring of three stages filled by cp.async. sm_75: two stages, filled
// through registers. Bound by the tensor cores: 16 products for 6 matrix loads of 512 bytes.
// Grid: a block a tile.
#pragma once

#include <cstdint>

#include "gemm/product/choice.h"
#include "gemm/product/epilogue.cuh"
#include "ptx/cp_async_part.cuh"
#include "ptx/mma.cuh"
#include "ptx/mma_s8.cuh"
#include "tile/swizzled_tile.cuh"

namespace llamatelemetry {

// The matrix instruction of an element type: what it sums in, and d += a * b over 32 bytes of k.
template <typename T, int kCapability>
struct ProductMma {
  using Sum = float;
  static __device__ void add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kCapability >= 80) {
      MmaSm80::add<T>(d, a, b0, b1);
    } else {
      MmaSm75::add<T>(d, a, b0, b1);
    }
  }
};
template <int kCapability>
struct ProductMma<int8_t, kCapability> {
  using Sum = int;
  static __device__ void add(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kCapability >= 80) {
      ptx::mma_m16n8k32(d, a, b0, b1);
    } else {
      ptx::mma_m8n8k16(d[0], d[1], a[0], b0);
      ptx::mma_m8n8k16(d[0], d[1], a[2], b1);
      ptx::mma_m8n8k16(d[2], d[3], a[1], b0);
      ptx::mma_m8n8k16(d[2], d[3], a[3], b1);
    }
  }
};

constexpr int kMmaTile = 128;        // rows of a and of b in a block
constexpr int kMmaDepthBytes = 128;  // of k in a stage
constexpr int kMmaThreads = 256;

// 16 bytes of an operand, of which num_bytes exist, and where they go in its tile.
struct OperandChunk {
  const char* from;
  int num_bytes;
  uint32_t to;
};

// How one operand's tile lies in shared memory. kAlongK: a row of it is one of the operand's.
template <typename T, bool kAlongK>
struct OperandTile {
  static constexpr int kDepth = kMmaDepthBytes / static_cast<int>(sizeof(T));
  // SwizzledTile counts in elements of two bytes.
  using Tile = SwizzledTile<kAlongK ? kMmaDepthBytes / 2 : kMmaTile>;
  static constexpr int kBytes = kMmaTile * kMmaDepthBytes;
  static constexpr int kChunks = kBytes / 16 / kMmaThreads;  // of a thread
  static_assert(kAlongK || sizeof(T) == 2);

  // Chunk i of a thread, of the tile at (first_row, first_k).
  static __device__ OperandChunk chunk(const Operand& x, const char* base, int64_t k,
                                       int64_t first_row, int64_t first_k, int i) {
    const int at = i * kMmaThreads + static_cast<int>(threadIdx.x);
    const int line = at / Tile::kChunks, column = at % Tile::kChunks;
    constexpr int kElements = 16 / sizeof(T);
    const int64_t row = first_row + (kAlongK ? line : column * kElements);
    const int64_t depth = first_k + (kAlongK ? column * kElements : line);
    const int64_t left = kAlongK ? k - depth : x.rows - row;
    const bool exists = row < x.rows && depth < k;
    const int64_t count = left < kElements ? left : kElements;
    const int64_t offset = kAlongK ? row * x.row_stride + depth : depth * x.k_stride + row;
    return {exists ? base + offset * static_cast<int64_t>(sizeof(T)) : base,
            exists ? static_cast<int>(count * sizeof(T)) : 0, Tile::offset(line, column)};
  }

  // The fragment of 16 rows from `row` on as a, at step `step` of 32 bytes of k.
  static __device__ void load_a(uint32_t (&r)[4], uint32_t tile, int lane, int row, int step) {
    if constexpr (kAlongK) {
      ptx::ldmatrix_x4(r, tile + Tile::offset(row + lane % 16, 2 * step + lane / 16));
    } else {
      ptx::ldmatrix_x4_trans(
          r, tile + Tile::offset(16 * step + lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2));
    }
  }
  // Likewise as b: r[0] and r[1] are the first 8 rows', r[2] and r[3] the next 8's.
  static __device__ void load_b(uint32_t (&r)[4], uint32_t tile, int lane, int row, int step) {
    if constexpr (kAlongK) {
      ptx::ldmatrix_x4(
          r, tile + Tile::offset(row + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    } else {
      ptx::ldmatrix_x4_trans(r, tile + Tile::offset(16 * step + lane % 16, row / 8 + lane / 16));
    }
  }
};

// What exists of a chunk, zeros behind it.
__device__ inline uint4 load_chunk(const OperandChunk& chunk) {
  if (chunk.num_bytes == 16) return *reinterpret_cast<const uint4*>(chunk.from);
  const auto* bytes = reinterpret_cast<const uint8_t*>(chunk.from);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < chunk.num_bytes) words[i / 4] |= static_cast<uint32_t>(bytes[i]) << 8 * (i % 4);
  }
  return {words[0], words[1], words[2], words[3]};
}

// kBlocks: of float16 that was e4m3, whether scales of blocks multiply the sums over kScaleBlock.
template <typename T, bool kAAlongK, bool kBAlongK, int kArch, bool kBlocks = false>
struct ProductMmaKernel {
  using Params = ProductParams;
  using Mma = ProductMma<T, kArch>;
  using Sum = typename Mma::Sum;
  using ATile = OperandTile<T, kAAlongK>;
  using BTile = OperandTile<T, kBAlongK>;
  static constexpr int kNumThreads = kMmaThreads;
  static constexpr int kMinBlocks = 1;
  static constexpr int kCapability = kArch;
  static constexpr int kStages = kArch >= 80 ? 3 : 2;
  static constexpr int kStageBytes = ATile::kBytes + BTile::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kWarpRows = 64, kWarpColumns = 32;
  static constexpr int kSteps = kMmaDepthBytes / 32;
  using Staged = StagedRows<kWarpColumns, Sum>;
  static_assert(Staged::bytes() * kNumThreads / 32 <= kSharedBytes);

  struct Block {
    const ProductParams& p;
    const char* a;
    const char* b;
    TilePlace place;
    uint32_t shared;
    int lane, warp_row, warp_column;
    Sum sums[kWarpRows / 16][kWarpColumns / 8][4];
    Sum total[kBlocks ? kWarpRows / 16 : 1][kWarpColumns / 8][4];  // of the blocks so far

    // After step `step` of `steps`: a block's sums go to the total, and the last time back.
    __device__ void add_blocks(int64_t step, int64_t steps) {
      constexpr int kStepsOfBlock = kScaleBlock / ATile::kDepth;
      static_assert(kScaleBlock % ATile::kDepth == 0 && kMmaTile == kScaleBlock);
      const bool last = step + 1 == steps;
      if (step % kStepsOfBlock != kStepsOfBlock - 1 && !last) return;
#pragma unroll
      for (int i = 0; i < kWarpRows / 16; ++i) {
        const BlockScales scales(p, place.row * kMmaTile + warp_row + 16 * i + lane / 4,
                                 place.column * kMmaTile);
        const float2 scale = scales.of(step / kStepsOfBlock);
#pragma unroll
        for (int j = 0; j < kWarpColumns / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            total[i][j][e] += sums[i][j][e] * (e < 2 ? scale.x : scale.y);
            sums[i][j][e] = last ? total[i][j][e] : 0.0f;
          }
        }
      }
    }

    // Chunk i of both operands: the first half are a's.
    __device__ OperandChunk chunk(int64_t step, int i) const {
      const int64_t first_k = step * ATile::kDepth;
      if (i < ATile::kChunks) {
        return ATile::chunk(p.a, a, p.k, place.row * kMmaTile, first_k, i);
      }
      OperandChunk found =
          BTile::chunk(p.b, b, p.k, place.column * kMmaTile, first_k, i - ATile::kChunks);
      found.to += ATile::kBytes;
      return found;
    }

    __device__ void multiply(uint32_t stage) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a_fragments[kWarpRows / 16][4], b_fragments[kWarpColumns / 16][4];
#pragma unroll
        for (int i = 0; i < kWarpRows / 16; ++i) {
          ATile::load_a(a_fragments[i], stage, lane, warp_row + 16 * i, step);
        }
#pragma unroll
        for (int j = 0; j < kWarpColumns / 16; ++j) {
          BTile::load_b(b_fragments[j], stage + ATile::kBytes, lane, warp_column + 16 * j, step);
        }
#pragma unroll
        for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
          for (int j = 0; j < kWarpColumns / 8; ++j) {
            const uint32_t (&both)[4] = b_fragments[j / 2];
            Mma::add(sums[i][j], a_fragments[i], both[j % 2 * 2], both[j % 2 * 2 + 1]);
          }
        }
      }
    }
  };

  static constexpr int kChunks = ATile::kChunks + BTile::kChunks;

  static __device__ void multiply_all_sm80(Block& block, int64_t steps) {
    const auto load = [&](int64_t step) {
      if (step < steps) {
        const uint32_t stage = block.shared + static_cast<int>(step % kStages) * kStageBytes;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          const OperandChunk chunk = block.chunk(step, i);
          ptx::cp_async_16_part(stage + chunk.to, chunk.from, chunk.num_bytes);
        }
      }
      ptx::cp_async_commit();
    };
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) load(step);
    for (int64_t step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1);
      block.multiply(block.shared + static_cast<int>(step % kStages) * kStageBytes);
      if constexpr (kBlocks) block.add_blocks(step, steps);
    }
    ptx::cp_async_wait<0>();
  }

  static __device__ void multiply_all_sm75(Block& block, char* s_stages, int64_t steps) {
    uint4 loaded[kChunks];
    const auto load = [&](int64_t step) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) loaded[i] = load_chunk(block.chunk(step, i));
    };
    const auto store = [&](int64_t step) {
      char* stage = s_stages + static_cast<int>(step % kStages) * kStageBytes;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        *reinterpret_cast<uint4*>(stage + block.chunk(step, i).to) = loaded[i];
      }
    };
    if (steps > 0) {
      load(0);
      store(0);
    }
    for (int64_t step = 0; step < steps; ++step) {
      __syncthreads();
      const bool more = step + 1 < steps;
      if (more) load(step + 1);
      block.multiply(block.shared + static_cast<int>(step % kStages) * kStageBytes);
      if constexpr (kBlocks) block.add_blocks(step, steps);
      if (more) store(step + 1);
    }
  }

  static __device__ void run(const ProductParams& p) {
    extern __shared__ __align__(1024) char s_product[];
    const int64_t row_tiles = (p.m + kMmaTile - 1) / kMmaTile;
    const int64_t column_tiles = (p.n + kMmaTile - 1) / kMmaTile;
    const int warp = threadIdx.x / 32;
    Block block{.p = p,
                .a = nullptr,
                .b = nullptr,
                .place = tile_place(blockIdx.x, row_tiles, column_tiles),
                .shared = ptx::shared_address(s_product),
                .lane = static_cast<int>(threadIdx.x) % 32,
                .warp_row = warp / 4 * kWarpRows,
                .warp_column = warp % 4 * kWarpColumns,
                .sums = {},
                .total = {}};
    block.a = static_cast<const char*>(p.a.data) + block.place.batch * p.a.batch_stride * sizeof(T);
    block.b = static_cast<const char*>(p.b.data) + block.place.batch * p.b.batch_stride * sizeof(T);
    const int64_t steps = (p.k + ATile::kDepth - 1) / ATile::kDepth;
    if constexpr (kArch >= 80) {
      multiply_all_sm80(block, steps);
    } else {
      multiply_all_sm75(block, s_product, steps);
    }
    __syncthreads();  // the stages become rows of sums
    Staged staged{reinterpret_cast<Sum*>(s_product + warp * Staged::bytes())};
#pragma unroll
    for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8; ++j) {
        const Sum(&four)[4] = block.sums[i][j];
        staged.put(block.lane, 8 * j, four[0], four[1], four[2], four[3]);
      }
      staged.store(p, block.lane, block.place.batch,
                   block.place.row * kMmaTile + block.warp_row + 16 * i,
                   block.place.column * kMmaTile + block.warp_column);
    }
  }
};

}  // namespace llamatelemetry
