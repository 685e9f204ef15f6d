// out[m, :] = x[m, :] . W^T + bias for few rows of x, W [n, k] packed (format/layout.h), on tensor
// cores: bound by reading W once.
//
// W is the A operand of mma.m16n8k16, its 16 rows a packed tile, and rows of x are the columns of
// B. A sum does not care about the order of its terms, so k is permuted within 16 such that one
// word of a packed row, four consecutive weights, is a lane's share of a fragment: codes go from
// shared memory to the fragment with a mask, two byte permutations and a subtraction. They are
// exact in T as integers; scales and minima are applied in float32 to sums over 16 or 32 weights,
// so each weight counts with the value that dequantize gives. Values of a float table are not exact
// in T: those are scaled first and rounded once, as weights of T are.
//
// A block has any number of warps. Each takes, in turn, a chunk of 256 weights of kRowTiles tiles,
// through its own ring of stages filled by cp.async: a tile's chunk is one run of bytes. The first
// are on their way to L2 before the wait for the kernel ahead. Codes are summed before they are
// scaled, so x past 1e34 leaves float32's range. Grid [ceil(tiles / kRowTiles), ceil(m / kTokens)],
// block whole warps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "format/decode.cuh"
#include "gemm/params.h"
#include "ptx/dependent_launch.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

// Two bytes of codes, which selector names, in the low ends of mantissas, minus offset.
template <typename Pair>
__device__ inline uint32_t bytes_to_pair(uint32_t codes, uint32_t mantissas, uint32_t selector,
                                         Pair offset) {
  const uint32_t bits = __byte_perm(codes, mantissas, selector);
  const Pair pair = __hsub2(reinterpret_cast<const Pair&>(bits), offset);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Four codes, a byte each, minus zero, as two pairs of T. A byte fits the mantissa of 1024 in
// float16; that of 128 in bfloat16 has room for seven bits, so bytes of eight go through float32.
template <typename T, bool kEightBits>
__device__ inline void codes_to_pairs(uint32_t codes, int zero, uint32_t& first, uint32_t& second) {
  constexpr uint32_t kLowBytes = 0x4140, kHighBytes = 0x4342;
  // The bits of 1024 + zero, or 128 + zero, twice: zero lies in the low end of the mantissa.
  const uint32_t offsets = static_cast<uint32_t>(zero) * 0x10001;
  if constexpr (std::is_same_v<T, Half>) {
    const uint32_t bits = offsets | 0x64006400;
    const auto& offset = reinterpret_cast<const __half2&>(bits);
    first = bytes_to_pair(codes, 0x64646464, kLowBytes, offset);
    second = bytes_to_pair(codes, 0x64646464, kHighBytes, offset);
  } else if constexpr (kEightBits) {
    float weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = byte_to_float(codes, i, zero);
    first = pack_two(weights[0], weights[1], T{});
    second = pack_two(weights[2], weights[3], T{});
  } else {
    const uint32_t bits = offsets | 0x43004300;
    const auto& offset = reinterpret_cast<const __nv_bfloat162&>(bits);
    first = bytes_to_pair(codes, 0x43434343, kLowBytes, offset);
    second = bytes_to_pair(codes, 0x43434343, kHighBytes, offset);
  }
}

// Four codes of E4M3 as two pairs of T, exactly.
template <typename T>
__device__ inline void e4m3_to_pairs(uint32_t codes, uint32_t& first, uint32_t& second) {
  const __half2 low = e4m3_to_half(codes, 0), high = e4m3_to_half(codes, 1);
  if constexpr (std::is_same_v<T, Half>) {
    first = reinterpret_cast<const uint32_t&>(low);
    second = reinterpret_cast<const uint32_t&>(high);
  } else {
    const float2 low_two = __half22float2(low), high_two = __half22float2(high);
    first = pack_two(low_two.x, low_two.y, T{});
    second = pack_two(high_two.x, high_two.y, T{});
  }
}

// kTokens: rows of x in a block, 1 or a multiple of 8.
template <typename T, int kFormat, int kTokens, int kRowTiles>
struct QuantSkinny {
  using Params = QuantLinearParams;
  using Word = PackedWord<kFormat, 2>;  // of rows 2 * group and 2 * group + 1 of a tile
  static constexpr int kCapability = 80;
  static constexpr int kNumThreads = kTokens == 1 ? 512 : 256;  // at most
  static constexpr int kStages =
      2;  // more take places of other blocks, whose loads overlap as well
  static constexpr int kMinBlocks = 1;
  static constexpr int kTokenTiles = (kTokens + 7) / 8;
  static constexpr int kChunk = 256;  // weights of a row
  static constexpr int kBlocks = kChunk / Word::kBlockSize;
  static constexpr int kChunkBytes = kBlocks * Word::kPackedBytes;
  static constexpr int kVectorBytes = 16;
  static constexpr int kTokenBytes = kChunk * sizeof(T) + 32;  // rows of x in different banks
  // Scales and zero points of each tile's groups, of formats that have them beside their blocks.
  static constexpr int kScalesBytes = Word::kHasGroups ? kBlocks * kScaleBytes : 0;
  static constexpr int kZerosBytes = Word::kHasZeros ? kBlocks * kZeroBytes : 0;
  static constexpr int kSideBytes = kScalesBytes + kZerosBytes;
  static constexpr int kSidesAt =
      kRowTiles * kChunkBytes + (kTokens * kTokenBytes + 127) / 128 * 128;
  static constexpr int kStageBytes = kSidesAt + (kRowTiles * kSideBytes + 127) / 128 * 128;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kColumns = 8 * kTokenTiles;
  // Of shared memory, for each warp.
  static constexpr int kWarpBytes =
      std::max(kStages * kStageBytes, kRows * kColumns * static_cast<int>(sizeof(float)));

  // A lane's share of x for four steps of 16 weights: b0 and b1 of each column tile.
  using Tokens = uint2[4][kTokenTiles];
  // For formats with a minimum the sums of x over the weights that share one: 32 or 16.
  static constexpr bool kScalePer16 = has_scale_per_16(Word::kScaleRule);
  using TokenSums = float[2][kScalePer16 ? 2 : 1][kTokenTiles][4];

  const Params& p;
  const int num_warps, warp, group, lane_in_group;
  const int num_chunks, blocks_per_row;
  const int first_tile, num_tiles;
  const int first_token, num_tokens;
  char* const stages;  // of this warp
  const float value_of_lane = Word::value_of_lane();
  float sums[kRowTiles][kTokenTiles][4] = {};

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(128) char s_bytes[];
    let_successors_start();
    QuantSkinny work(p, s_bytes);
    work.prefetch_weights(work.warp);
    wait_for_predecessors();
    for (int i = 0; i < kStages - 1; ++i) {
      work.load_weights(work.warp + i * work.num_warps, i);
      work.load_scales(work.warp + i * work.num_warps, i);
      work.load_tokens(work.warp + i * work.num_warps, i);
    }
    work.multiply();
    work.reduce_and_store(reinterpret_cast<float*>(s_bytes));
  }

  __device__ QuantSkinny(const Params& p, char* s_bytes)
      : p(p),
        num_warps(blockDim.x / kWarpSize),
        warp(threadIdx.x / kWarpSize),
        group(threadIdx.x % kWarpSize / 4),
        lane_in_group(threadIdx.x % 4),
        num_chunks(static_cast<int>((p.k + kChunk - 1) / kChunk)),
        blocks_per_row(static_cast<int>(p.k / Word::kBlockSize)),
        first_tile(blockIdx.x * kRowTiles),
        num_tiles(static_cast<int>((p.n + kTileRows - 1) / kTileRows)),
        first_token(blockIdx.y * kTokens),
        num_tokens(min(kTokens, static_cast<int>(p.m) - first_token)),
        stages(s_bytes + warp * kWarpBytes) {}

  __device__ char* stage(int i) const { return stages + i * kStageBytes; }
  __device__ int lane() const { return threadIdx.x % kWarpSize; }

  // A chunk of row tile r, and how many bytes of it there are.
  __device__ const uint8_t* chunk_of(int r, int chunk) const {
    const int64_t tile = first_tile + r;
    return p.packed + (tile * blocks_per_row + int64_t{chunk} * kBlocks) * Word::kPackedBytes;
  }
  __device__ int bytes_of(int chunk) const {
    return min(kBlocks, blocks_per_row - chunk * kBlocks) * Word::kPackedBytes;
  }
  __device__ void prefetch_weights(int chunk) const {
    if (chunk >= num_chunks) return;
    constexpr int kLineBytes = 128;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (first_tile + r >= num_tiles) break;
      for (int byte = lane() * kLineBytes; byte < bytes_of(chunk); byte += kWarpSize * kLineBytes) {
        ptx::prefetch_l2(chunk_of(r, chunk) + byte);
      }
      if (Word::kHasGroups && lane() == 0) {
        ptx::prefetch_l2(scales_of(p.groups, first_tile + r, int64_t{chunk} * kBlocks).scales);
      }
    }
  }
  __device__ void load_weights(int chunk, int into) const {
    if (chunk >= num_chunks) return;
    const int num_bytes = bytes_of(chunk);
    const uint32_t to = ptx::shared_address(stage(into));
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (first_tile + r >= num_tiles) break;
      const uint8_t* from = chunk_of(r, chunk);
#pragma unroll
      for (int byte = lane() * kVectorBytes; byte < kChunkBytes; byte += kWarpSize * kVectorBytes) {
        if (byte < num_bytes) {
          ptx::cp_async_16(to + r * kChunkBytes + byte, from + byte);
        }
      }
    }
  }
  // Of row tile r: the groups that the blocks of a chunk are in.
  __device__ void load_scales(int chunk, int into) const {
    if constexpr (!Word::kHasGroups) return;
    if (chunk >= num_chunks) return;
    const int last = min((chunk + 1) * kBlocks, blocks_per_row) - 1;
    const int first_group = (chunk * kBlocks) >> p.groups.shift;
    const int count = (last >> p.groups.shift) - first_group + 1;
    const uint32_t to = ptx::shared_address(stage(into)) + kSidesAt;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (first_tile + r >= num_tiles) break;
      const TileScales from = scales_of(p.groups, first_tile + r, int64_t{chunk} * kBlocks);
      const int byte = lane() * kVectorBytes;
      if (byte < count * kScaleBytes) {
        ptx::cp_async_16(to + r * kSideBytes + byte, from.scales + byte / sizeof(float));
      }
      if (Word::kHasZeros && byte < count * kZeroBytes) {
        ptx::cp_async_16(to + r * kSideBytes + kScalesBytes + byte, from.zeros + byte);
      }
    }
  }
  __device__ TileScales staged_scales(const char* s_stage, int r, int block) const {
    if constexpr (!Word::kHasGroups) return {};
    const int group = block >> p.groups.shift;  // a chunk begins with a group
    const auto* side = reinterpret_cast<const uint8_t*>(s_stage) + kSidesAt + r * kSideBytes;
    return {reinterpret_cast<const float*>(side) + group * kTileRows,
            side + kScalesBytes + group * kZeroBytes};
  }
  // Ends the group of copies of a stage.
  __device__ void load_tokens(int chunk, int into) const {
    const int column = chunk * kChunk + lane() * (kVectorBytes / static_cast<int>(sizeof(T)));
    if (chunk < num_chunks && column < p.k) {
      const T* from = static_cast<const T*>(p.x) + first_token * p.x_row_stride + column;
      const uint32_t to =
          ptx::shared_address(stage(into)) + kRowTiles * kChunkBytes + lane() * kVectorBytes;
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        if (token < num_tokens) {
          ptx::cp_async_16(to + token * kTokenBytes, from + token * p.x_row_stride);
        }
      }
    }
    ptx::cp_async_commit();
  }

  __device__ void multiply() {
    int current = 0;
    for (int chunk = warp; chunk < num_chunks; chunk += num_warps) {
      ptx::cp_async_wait<kStages - 2>();
      __syncwarp();
      const int free = current == 0 ? kStages - 1 : current - 1;
      load_weights(chunk + (kStages - 1) * num_warps, free);
      load_scales(chunk + (kStages - 1) * num_warps, free);
      load_tokens(chunk + (kStages - 1) * num_warps, free);
      const int blocks = min(kBlocks, blocks_per_row - chunk * kBlocks);
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter)
        multiply_quarter(stage(current), quarter, blocks);
      current = current + 1 == kStages ? 0 : current + 1;
      __syncwarp();  // before the stage is filled again
    }
  }

  // Two runs of 32 weights of a chunk: neighbours, or in six-bit formats 64 apart, as the two
  // nibbles of a word are.
  static constexpr bool kSuperBlocks = Word::kBlockSize == kChunk;
  static __device__ constexpr int first_weight(int quarter, int run) {
    if (Word::kSixBits) return 32 * (quarter / 2 * 4 + quarter % 2 + 2 * run);
    return 64 * quarter + 32 * run;
  }

  __device__ void multiply_quarter(const char* s_stage, int quarter, int blocks) {
    // Of a last chunk that is not whole, a run may be missing.
    const bool exists[2] = {kSuperBlocks || 2 * quarter < blocks,
                            kSuperBlocks || 2 * quarter + 1 < blocks};
    Tokens x;
    TokenSums x_sums;
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      if (!exists[run]) continue;
      read_tokens(s_stage, first_weight(quarter, run), x[2 * run]);
      read_tokens(s_stage, first_weight(quarter, run) + 16, x[2 * run + 1]);
      if constexpr (Word::kHasMin) sum_tokens(x, run, x_sums[run]);
    }
    const auto* tiles = reinterpret_cast<const uint8_t*>(s_stage);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const uint8_t* tile = tiles + r * kChunkBytes;
      if constexpr (!Word::kGroupsOfOneSubBlock) {
        const int first = first_weight(quarter, 0) / 32, second = first_weight(quarter, 1) / 32;
        const Word low(tile, Word::word_of(first, lane_in_group), 2 * group);
        const Word high(tile, Word::word_of(first, lane_in_group + 4), 2 * group);
        const int parts[2] = {Word::part_of(first, 0), Word::part_of(second, 0)};
        multiply_run(r, 0, x, x_sums, low, parts[0], high, parts[0]);
        multiply_run(r, 1, x, x_sums, low, parts[1], high, parts[1]);
      } else {
#pragma unroll
        for (int run = 0; run < 2; ++run) {
          if (!exists[run]) continue;
          const int sub_block = kSuperBlocks ? 2 * quarter + run : 0;
          const uint8_t* block =
              kSuperBlocks ? tile : tile + (2 * quarter + run) * Word::kPackedBytes;
          const int low_part = Word::part_of(sub_block, 0);
          const int high_part = Word::part_of(sub_block, Word::kTernary ? lane_in_group + 4 : 4);
          const TileScales side = staged_scales(s_stage, r, 2 * quarter + run);
          const Word low(block, Word::word_of(sub_block, lane_in_group), 2 * group, side);
          if constexpr (Word::kByteCodes || Word::kTernary) {
            const Word high(block, Word::word_of(sub_block, lane_in_group + 4), 2 * group, side);
            multiply_run(r, run, x, x_sums, low, low_part, high, high_part);
          } else {
            multiply_run(r, run, x, x_sums, low, low_part, low, high_part);
          }
        }
      }
    }
  }

  __device__ void to_pairs(const Word& word, int part, int row, uint32_t (&a)[4]) const {
    if constexpr (Word::kHasFloatTable) {
      float weights[4];
      word.decode_fused(part, row, value_of_lane, weights);
      a[row] = pack_two(weights[0], weights[1], T{});
      a[2 + row] = pack_two(weights[2], weights[3], T{});
    } else if constexpr (Word::kFloating) {
      e4m3_to_pairs<T>(word.codes(part, row), a[row], a[2 + row]);
    } else {
      codes_to_pairs<T, Word::kEightBits>(word.codes(part, row), word.offset(row), a[row],
                                          a[2 + row]);
    }
  }

  // sums += 32 weights, the first 16 in a part of `low`, the others in one of `high`.
  __device__ void multiply_run(int r, int run, const Tokens& x, const TokenSums& x_sums,
                               const Word& low, int low_part, const Word& high, int high_part) {
    uint32_t a[2][4];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      to_pairs(low, low_part, row, a[0]);
      to_pairs(high, high_part, row, a[1]);
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const uint2 first = x[2 * run][n], second = x[2 * run + 1][n];
      if constexpr (Word::kHasFloatTable) {
        ptx::mma_m16n8k16(sums[r][n], a[0], first.x, first.y, sums[r][n], T{});
        ptx::mma_m16n8k16(sums[r][n], a[1], second.x, second.y, sums[r][n], T{});
        continue;
      }
      constexpr float kZeros[4] = {};
      float products[4];
      ptx::mma_m16n8k16(products, a[0], first.x, first.y, kZeros, T{});
      if constexpr (kScalePer16) {
        add_scaled(sums[r][n], products, low, low_part);
        ptx::mma_m16n8k16(products, a[1], second.x, second.y, kZeros, T{});
        add_scaled(sums[r][n], products, high, high_part);
      } else {
        ptx::mma_m16n8k16(products, a[1], second.x, second.y, products, T{});
        add_scaled(sums[r][n], products, low, low_part);
      }
      if constexpr (Word::kHasMin) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[r][n][e] = fmaf(-low.min(low_part, e / 2), x_sums[run][0][n][e], sums[r][n][e]);
          if constexpr (kScalePer16) {
            sums[r][n][e] = fmaf(-high.min(high_part, e / 2), x_sums[run][1][n][e], sums[r][n][e]);
          }
        }
      }
    }
  }
  static __device__ void add_scaled(float (&sum)[4], const float (&products)[4], const Word& word,
                                    int part) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] = fmaf(products[e], word.scale(part, e / 2), sum[e]);
  }

  __device__ void read_tokens(const char* s_stage, int column, uint2 (&x)[kTokenTiles]) const {
    const char* rows = s_stage + kRowTiles * kChunkBytes + (column + 4 * lane_in_group) * sizeof(T);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int token = 8 * n + group;
      x[n] = token < num_tokens ? *reinterpret_cast<const uint2*>(rows + token * kTokenBytes)
                                : uint2{};
    }
  }
  // A product with ones, which leaves the sums where the products with the weights have theirs.
  static __device__ void sum_tokens(const Tokens& x, int run,
                                    float (&sum)[kScalePer16 ? 2 : 1][kTokenTiles][4]) {
    constexpr uint32_t kOnes = std::is_same_v<T, Half> ? 0x3c003c00 : 0x3f803f80;
    constexpr uint32_t a[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      constexpr float kZeros[4] = {};
      const uint2 first = x[2 * run][n], second = x[2 * run + 1][n];
      ptx::mma_m16n8k16(sum[0][n], a, first.x, first.y, kZeros, T{});
      if constexpr (kScalePer16) {
        ptx::mma_m16n8k16(sum[1][n], a, second.x, second.y, kZeros, T{});
      } else {
        ptx::mma_m16n8k16(sum[0][n], a, second.x, second.y, sum[0][n], T{});
      }
    }
  }

  // Adds the warps' sums up, in their order.
  __device__ void reduce_and_store(float* s_sums) const {
    ptx::cp_async_wait<0>();
    __syncthreads();
    // Rows 2 * group and 2 * group + 1 of a tile were rows group and group + 8 of the fragment.
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = kTileRows * r + 2 * group + e / 2;
          const int token = 8 * n + 2 * lane_in_group + e % 2;
          s_sums[(warp * kRows + row) * kColumns + token] = sums[r][n][e];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kTokens; i += blockDim.x) {
      const int row = i % kRows, token = i / kRows;
      const int64_t column = int64_t{first_tile} * kTileRows + row;
      if (token >= num_tokens || column >= p.n) continue;
      float total = 0;
      for (int w = 0; w < num_warps; ++w) total += s_sums[(w * kRows + row) * kColumns + token];
      if (p.bias != nullptr) total += to_float(static_cast<const T*>(p.bias)[column]);
      static_cast<T*>(p.out)[(first_token + token) * p.n + column] = from_float<T>(total);
    }
  }
};

}  // namespace llamatelemetry
