// out[m, :] = x[m, :] . W^T + bias for 9 to 128 rows of x, W [n, k] packed (format/layout.h), on
// Hopper's tensor cores: bound by decoding W once, at fewer bytes than a read of dense weights.
//
// W is the A operand of wgmma, 16 rows a warp: codes become weights of T in registers, by float32
// and rounded once, as dequantize rounds them. Rows of x are the columns of B, in shared memory. A
// lane's share of a fragment is half of the bytes of two packed words, picked by one permutation of
// bytes, so x lies there in its own order.
//
// A block makes 64 columns of out for each of its warpgroups: each warp has the packed tile of its
// 16 rows, in chunks of k through a ring of stages that the copy engine fills. While the tensor
// cores multiply a run of 32 weights, the warps decode the next. Few tiles: the blocks of a cluster
// share the chunks of k and add their sums up through each other's shared memory, in the order of
// their ranks. Grid [splits * ceil(n / rows), ceil(m / tokens)], clusters of splits, block 128 *
// groups.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>

#include "format/decode.cuh"
#include "gemm/choice.h"
#include "gemm/params.h"
#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_k_major.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

struct QuantWgmmaArgs {
  QuantLinearParams call;
  CUtensorMap x_map;  // boxes of 64 columns of kTokens rows of x; what lies outside reads as 0
};

template <typename T, int kFormat, QuantWgmmaConfig kConfig>
struct QuantWgmma {
  using Params = QuantWgmmaArgs;
  using Word = PackedWord<kFormat, 2>;  // of rows 2 * group and 2 * group + 1 of a tile
  static constexpr int kCapability = 90;
  static constexpr int kTokens = kConfig.tokens;
  static constexpr int kNumWarps = 4 * kConfig.groups;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kRows = kNumWarps * kTileRows;
  static constexpr bool kSuperBlocks = Word::kBlockSize > 32;
  static constexpr int kChunk = kSuperBlocks ? Word::kBlockSize : 128;  // weights of a row
  static constexpr int kRuns = kChunk / 32;
  static constexpr int kColumns = 64;  // of x in a row of 128 bytes, swizzled
  static constexpr int kBoxes = kChunk / kColumns;
  static constexpr int kBlocks = kChunk / Word::kBlockSize;
  static constexpr int kTileBytes = kBlocks * Word::kPackedBytes;  // of a tile's chunk
  static constexpr int kBoxBytes = kTokens * kColumns * static_cast<int>(sizeof(T));
  static constexpr int kWeightsAt = kBoxes * kBoxBytes;  // in a stage
  // Scales and zero points of each tile's groups, of formats that have them beside their blocks.
  static constexpr int kScalesBytes = Word::kHasGroups ? kBlocks * kScaleBytes : 0;
  static constexpr int kZerosBytes = Word::kHasZeros ? kBlocks * kZeroBytes : 0;
  static constexpr int kSideBytes = kScalesBytes + kZerosBytes;
  static constexpr int kSidesAt = kWeightsAt + kNumWarps * kTileBytes;
  static constexpr int kStageBytes = (kSidesAt + kNumWarps * kSideBytes + 1023) / 1024 * 1024;
  static constexpr int kMaxShared = 227 * 1024;
  static constexpr int kMaxStages = 6;
  static constexpr int kBarrierBytes = 2 * kMaxStages * static_cast<int>(sizeof(uint64_t));
  // Two blocks on a multiprocessor where they fit: one decodes while the other waits.
  static constexpr int kMinBlocks =
      kConfig.groups <= 2 && 2 * (2 * kStageBytes + 1024 + kBarrierBytes) <= kMaxShared ? 2 : 1;
  static constexpr int kStages =
      std::clamp((kMaxShared / kMinBlocks - 1024 - kBarrierBytes) / kStageBytes, 2, kMaxStages);
  // Sums of a block, a row for each token.
  static constexpr int kSumColumns = kRows + 4;
  static constexpr int kBarriersAt =
      std::max(kStages * kStageBytes, kTokens * kSumColumns * static_cast<int>(sizeof(float)));
  static constexpr int kSharedBytes = kBarriersAt + kBarrierBytes;
  static_assert(kSharedBytes <= kMaxShared);

  const QuantLinearParams& p;
  const CUtensorMap* const x_map;
  char* const s_bytes;
  const int warp, lane;
  const int rank, splits;
  const int num_chunks, blocks_per_row;
  const int64_t first_tile;
  const int num_tiles;  // of this block
  const int first_token, num_tokens;
  const float value_of_lane = Word::value_of_lane();
  float sums[kTokens / 2] = {};

  static __device__ void run(const Params& args) {
    extern __shared__ __align__(1024) char s_bytes[];
    let_successors_start();
    QuantWgmma work(args, s_bytes);
    work.prepare();
    wait_for_predecessors();
    work.multiply();
    work.reduce_and_store();
  }

  __device__ QuantWgmma(const Params& args, char* s_bytes)
      : p(args.call),
        x_map(&args.x_map),
        s_bytes(s_bytes),
        warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        rank(static_cast<int>(blockIdx.x) % p.splits),
        splits(p.splits),
        num_chunks(static_cast<int>((p.k + kChunk - 1) / kChunk)),
        blocks_per_row(static_cast<int>(p.k / Word::kBlockSize)),
        first_tile(int64_t{blockIdx.x / p.splits} * kNumWarps),
        num_tiles(static_cast<int>(
            min(int64_t{kNumWarps}, (p.n + kTileRows - 1) / kTileRows - first_tile))),
        first_token(static_cast<int>(blockIdx.y) * kTokens),
        num_tokens(min(kTokens, static_cast<int>(p.m) - first_token)) {}

  __device__ uint32_t full(int stage) const {
    return ptx::shared_address(s_bytes + kBarriersAt) + stage * sizeof(uint64_t);
  }
  __device__ uint32_t empty(int stage) const { return full(kMaxStages + stage); }

  __device__ int bytes_of(int chunk) const {
    return min(kBlocks, blocks_per_row - chunk * kBlocks) * Word::kPackedBytes;
  }
  __device__ const uint8_t* chunk_of(int tile, int chunk) const {
    return p.packed + (first_tile + tile) * blocks_per_row * int64_t{Word::kPackedBytes} +
           int64_t{chunk} * kTileBytes;
  }

  // Barriers, and the first weights on their way to L2.
  __device__ void prepare() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        ptx::mbarrier_init(full(i), 1);
        ptx::mbarrier_init(empty(i), kNumWarps);
      }
      ptx::fence_mbarrier_init();
      ptx::prefetch_tensor_map(x_map);
    }
    // Of a last chunk that is not whole, what is not there meets zeros of x: it must be finite.
    if (p.k % kChunk != 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        auto* words = reinterpret_cast<uint4*>(s_bytes + stage * kStageBytes + kWeightsAt);
        for (int i = threadIdx.x; i < kNumWarps * (kTileBytes + kSideBytes) / 16;
             i += kNumThreads) {
          words[i] = uint4{};
        }
      }
      ptx::fence_proxy_async_shared();
    }
    constexpr int kLineBytes = 128;
    if (warp < num_tiles && rank < num_chunks) {
      for (int byte = lane * kLineBytes; byte < bytes_of(rank); byte += kWarpSize * kLineBytes) {
        ptx::prefetch_l2(chunk_of(warp, rank) + byte);
      }
    }
    __syncthreads();
  }

  // Of one warp: the copies of a chunk into a stage, boxes of x and the tiles' runs of bytes.
  __device__ void load(int chunk, int stage) const {
    if (chunk >= num_chunks) return;
    const uint32_t to = ptx::shared_address(s_bytes + stage * kStageBytes);
    const int num_bytes = bytes_of(chunk);
    const int num_groups = groups_of(chunk);
    const int scale_bytes = Word::kHasGroups ? num_groups * kScaleBytes : 0;
    const int zero_bytes = Word::kHasZeros ? num_groups * kZeroBytes : 0;
    if (lane == 0) {
      ptx::mbarrier_arrive_expect(full(stage),
                                  kWeightsAt + num_tiles * (num_bytes + scale_bytes + zero_bytes));
    }
    __syncwarp();
    if (lane < kBoxes) {
      ptx::tma_load_2d(to + lane * kBoxBytes, x_map, full(stage), chunk * kChunk + lane * kColumns,
                       first_token);
    }
    const int tile = lane - (kWarpSize - kNumWarps);
    if (tile >= 0 && tile < num_tiles) {
      ptx::bulk_load(to + kWeightsAt + tile * kTileBytes, chunk_of(tile, chunk), num_bytes,
                     full(stage));
      if constexpr (Word::kHasGroups) {
        const TileScales from = scales_of(p.groups, first_tile + tile, int64_t{chunk} * kBlocks);
        const uint32_t side = to + kSidesAt + tile * kSideBytes;
        ptx::bulk_load(side, from.scales, scale_bytes, full(stage));
        if constexpr (Word::kHasZeros) {
          ptx::bulk_load(side + kScalesBytes, from.zeros, zero_bytes, full(stage));
        }
      }
    }
    __syncwarp();
  }
  // How many groups the blocks of a chunk are in.
  __device__ int groups_of(int chunk) const {
    const int last = min((chunk + 1) * kBlocks, blocks_per_row) - 1;
    return (last >> p.groups.shift) - (chunk * kBlocks >> p.groups.shift) + 1;
  }

  // A stage is filled again kLag chunks after it was read: with stages to spare the warp that does
  // it need not wait for the slowest.
  static constexpr int kLag = kStages > 2 ? 2 : 1;
  static constexpr int kAhead = kStages - kLag;

  __device__ void multiply() {
    if (warp == 0) {
      for (int i = 0; i < kAhead; ++i) load(rank + i * splits, i);
    }
    int count = 0, stage = 0, parity = 0;    // of the chunk at hand
    int target = kAhead, target_parity = 1;  // of the stage that is filled meanwhile
    for (int chunk = rank; chunk < num_chunks; chunk += splits) {
      ptx::mbarrier_wait(full(stage), parity);
      multiply_chunk(s_bytes + stage * kStageBytes, [&] {
        if (warp != 0) return;
        if (count >= kLag) ptx::mbarrier_wait(empty(target), target_parity);
        load(chunk + kAhead * splits, target);
      });
      if (lane == 0) ptx::mbarrier_arrive(empty(stage));
      ++count;
      if (++stage == kStages) stage = 0, parity ^= 1;
      if (++target == kStages) target = 0, target_parity ^= 1;
    }
  }

  // A chunk in runs of 32 weights, in pairs that come from the same words: neighbours, or in
  // six-bit formats 64 apart, as the two nibbles of a word are.
  static __device__ constexpr int first_weight(int run) {
    const int pair = run / 2;
    if (Word::kSixBits) return 32 * (pair / 2 * 4 + pair % 2 + run % 2 * 2);
    return 32 * run;
  }

  // refill: called once the tensor cores have work.
  template <typename Refill>
  __device__ void multiply_chunk(const char* stage, Refill&& refill) {
    const auto* weights = reinterpret_cast<const uint8_t*>(stage) + kWeightsAt + warp * kTileBytes;
    const uint64_t x = ptx::k_major_descriptor(ptx::shared_address(stage));
    uint32_t a[2][2][4];  // of two runs: two steps of 16 weights each
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (run == 1) refill();
      if (run >= 2) ptx::wgmma_wait<1>();  // the registers that come now are free
      decode(weights, staged_scales(stage, run), run, a[run % 2]);
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int column = first_weight(run) + 16 * step;
        const int offset = column / kColumns * kBoxBytes + column % kColumns * int{sizeof(T)};
        ptx::wgmma_registers_k_major<T, kTokens>(sums, a[run % 2][step], x + (offset >> 4));
      }
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(sums);
  }

  __device__ TileScales staged_scales(const char* stage, int block) const {
    if constexpr (!Word::kHasGroups) return {};
    const int group = block >> p.groups.shift;  // a chunk begins with a group
    const auto* side = reinterpret_cast<const uint8_t*>(stage) + kSidesAt + warp * kSideBytes;
    return {reinterpret_cast<const float*>(side) + group * kTileRows,
            side + kScalesBytes + group * kZeroBytes};
  }

  // Of 16 weights of each row, a lane has the 2 * t-th and the next of each half, t = lane % 4:
  // half of the bytes of two words.
  __device__ void decode(const uint8_t* weights, const TileScales& side, int run,
                         uint32_t (&a)[2][4]) const {
    const int word = lane % 4 / 2, row = lane / 4 * 2;
    const uint32_t selector = lane % 2 == 0 ? 0x5410 : 0x7632;
    if constexpr (kSuperBlocks) {
      const int pair = run / 2;
      const int first = Word::kSixBits ? pair / 2 * 16 + pair % 2 * 8 : 8 * pair;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        fragment(Word(weights, first + 4 * step + word, row, selector), run % 2, a[step]);
      }
    } else {
      const uint8_t* block = weights + run * Word::kPackedBytes;
      if constexpr (Word::kByteCodes) {
        fragment(Word(block, word, row, selector, side), 0, a[0]);
        fragment(Word(block, word + 4, row, selector, side), 0, a[1]);
      } else {
        const Word both(block, word, row, selector, side);
        fragment(both, 0, a[0]);
        fragment(both, 1, a[1]);
      }
    }
  }
  __device__ void fragment(const Word& word, int part, uint32_t (&a)[4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float values[4];
      word.decode_fused(part, r, value_of_lane, values);
      a[r] = pack_two(values[0], values[1], T{});
      a[2 + r] = pack_two(values[2], values[3], T{});
    }
  }

  __device__ void reduce_and_store() {
    float* s_sums = reinterpret_cast<float*>(s_bytes);
    __syncthreads();  // the stages are free
    // Rows 2 * group and 2 * group + 1 of a tile were rows group and group + 8 of the fragment.
    const int row = warp * kTileRows + lane / 4 * 2;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = 8 * j + lane % 4 * 2 + e;
        *reinterpret_cast<float2*>(s_sums + token * kSumColumns + row) =
            float2{sums[4 * j + e], sums[4 * j + 2 + e]};
      }
    }
    const bool shared = splits > 1;
    if (shared) {
      ptx::cluster_sync();
    } else {
      __syncthreads();
    }
    constexpr int kFours = kRows / 4;
    for (int i = threadIdx.x; i < num_tokens * kFours; i += kNumThreads) {
      const int token = i / kFours;
      if (token % splits == rank) store_four_columns(s_sums, token, i % kFours * 4);
    }
    if (shared) ptx::cluster_sync();  // nobody leaves while its sums are read
  }

  __device__ void store_four_columns(const float* s_sums, int token, int row) const {
    const float* from = s_sums + token * kSumColumns + row;
    float total[4] = {};
    for (int r = 0; r < splits; ++r) {
      float4 part;
      if (splits > 1) {
        part = ptx::load_cluster(ptx::cluster_address(ptx::shared_address(from), r));
      } else {
        part = *reinterpret_cast<const float4*>(from);
      }
      total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
    }
    const int64_t column = first_tile * kTileRows + row;
    T* out = static_cast<T*>(p.out) + (int64_t{first_token} + token) * p.n + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i >= p.n) return;
      if (p.bias != nullptr) total[i] += to_float(static_cast<const T*>(p.bias)[column + i]);
      out[i] = from_float<T>(total[i]);
    }
  }
};

}  // namespace llamatelemetry
