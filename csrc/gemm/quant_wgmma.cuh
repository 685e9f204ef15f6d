// out[m, :] = x[m, :] . W^T + bias for 9 to 256 rows of x, W [n, k] packed
// (format/layout.h), on Hopper's tensor cores: bound by decoding W once for all rows of x of a
// block, at fewer bytes than a read of dense weights.
//
// W is the A operand of wgmma, decoded into registers (quant_wgmma_fragments.cuh), 16 rows a warp;
// rows of x are the columns of B, in shared memory. Where 128 weights of a row share a scale and
// accumulators suffice (kExactCodes), W's codes are multiplied as they are and each 128 products
// are scaled as they are added up, in float32; x past 1e34 may leave its range then. Elsewhere
// weights are scaled first and rounded to T.
//
// A block has kConfig.row_groups warpgroups side by side, of 64 rows of W each, and kConfig.parts
// of such that take turns at the chunks of k and add up through shared memory. A warp copies the
// packed tile of its 16 rows into a ring of its own, by cp.async; the copy engine fills a ring of
// stages with x for each part. While the tensor cores multiply a run of 32 weights, the warps
// decode the next. Few tiles: the blocks of a cluster share the chunks of k and add their sums up
// through each other's shared memory, in the order of their ranks.
// Grid [splits * token tiles * ceil(n / rows)], clusters of splits. As in quant_stream.cuh the
// first weights are read before the wait for the kernel ahead.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "gemm/params.h"
#include "gemm/quant_wgmma_fragments.cuh"
#include "gemm/wgmma_plan.h"
#include "ptx/cluster.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_k_major.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

struct QuantWgmmaArgs {
  QuantLinearParams call;
  QuantWgmmaPlan plan;
  int token_tiles;
  CUtensorMap x_map;  // boxes of 64 columns of kTokens rows of x; what lies outside reads as 0
};

template <typename T, int kFormat, WgmmaConfig kConfig, bool kExactCodes>
struct QuantWgmma {
  using Params = QuantWgmmaArgs;
  using Word = PackedWord<kFormat, 2>;  // of rows 2 * group and 2 * group + 1 of a tile
  using Weights = WeightFragments<T, kFormat>;
  static constexpr int kCapability = 90;
  static constexpr int kTokens = kConfig.tokens;
  static constexpr int kParts = kConfig.parts;
  static constexpr int kWarpsOfPart = 4 * kConfig.row_groups;
  static constexpr int kNumWarps = kWarpsOfPart * kParts;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kMinBlocks = 1;
  static constexpr int kRows = kWarpsOfPart * kTileRows;
  static constexpr int kStep = kWgmmaStep;                          // columns of x in a stage
  static constexpr int kChunk = std::max(kStep, Word::kBlockSize);  // weights of a row in a slot
  static constexpr int kSteps = kChunk / kStep;
  static constexpr int kRuns = kStep / 32;
  static constexpr int kColumns = 64;  // of x in a row of 128 bytes, swizzled
  static constexpr int kBoxes = kStep / kColumns;
  static constexpr int kBlocks = kChunk / Word::kBlockSize;
  static constexpr int kTileBytes = kBlocks * Word::kPackedBytes;  // of a tile's chunk
  static constexpr int kBoxBytes = kTokens * kColumns * static_cast<int>(sizeof(T));
  static constexpr int kStageBytes = kBoxes * kBoxBytes;
  // Scales and zero points, of formats that have them beside their blocks: of the chunk, or of each
  // of its blocks.
  static constexpr int kSides = kExactCodes ? 1 : kBlocks;
  static constexpr int kScalesBytes = Word::kHasGroups ? kSides * kScaleBytes : 0;
  static constexpr int kZerosBytes = Word::kHasZeros ? kSides * kZeroBytes : 0;
  static constexpr int kSlotBytes = kTileBytes + kScalesBytes + kZerosBytes;
  static constexpr int kMaxShared = 227 * 1024;
  // The ring of a warp's weights; the rest is for x.
  static constexpr int kDepth = std::clamp(96 * 1024 / (kNumWarps * kSlotBytes), 2, 6);
  static constexpr int kSlotsBytes = kNumWarps * kDepth * kSlotBytes;
  static constexpr int kMaxStages = 6;
  static constexpr int kBarrierBytes = 2 * kParts * kMaxStages * static_cast<int>(sizeof(uint64_t));
  static constexpr int kStages = std::clamp(
      (kMaxShared - kBarrierBytes - kSlotsBytes) / (kParts * kStageBytes), 2, kMaxStages);
  static constexpr int kSlotsAt = kParts * kStages * kStageBytes;
  // Sums of a part, a row for each token.
  static constexpr int kSumColumns = kRows + 4;
  static constexpr int kPartFloats = kTokens * kSumColumns;
  static constexpr int kBarriersAt =
      std::max(kSlotsAt + kSlotsBytes, kParts * kPartFloats * static_cast<int>(sizeof(float)));
  static constexpr int kSharedBytes = kBarriersAt + kBarrierBytes;
  static_assert(kSharedBytes <= kMaxShared);

  const QuantLinearParams& p;
  const CUtensorMap* const x_map;
  char* const s_bytes;
  const int warp, lane, part;
  const int rank, splits;
  const int num_chunks, blocks_per_row;
  const int64_t first_tile, tile;  // of the block, of this warp
  const bool has_tile;
  const int first_token, num_tokens;
  // What load_weights loads next, and where to; a lane's piece of scales and zero points.
  int load_chunk;
  const uint8_t* load_from;
  uint32_t load_to;
  const uint32_t slots_end;
  bool loads_side = false;
  int side_block = 0, side_stride = 0;
  uint32_t side_to = 0;
  const uint8_t* side_from = nullptr;
  const float value_of_lane = Word::value_of_lane();
  float sums[kTokens / 2];

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
        // By a shuffle, so that the compiler knows it to be the same in all lanes.
        warp(__shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / kWarpSize, 0)),
        lane(threadIdx.x % kWarpSize),
        part(warp / kWarpsOfPart),
        rank(static_cast<int>(blockIdx.x) % args.plan.splits),
        splits(args.plan.splits),
        num_chunks(static_cast<int>((p.k + kChunk - 1) / kChunk)),
        blocks_per_row(static_cast<int>(p.k / Word::kBlockSize)),
        first_tile(int64_t{blockIdx.x} / splits / args.token_tiles * kWarpsOfPart),
        tile(first_tile + warp % kWarpsOfPart),
        has_tile(tile < (p.n + kTileRows - 1) / kTileRows),
        first_token(static_cast<int>(blockIdx.x) / splits % args.token_tiles * kTokens),
        num_tokens(min(kTokens, static_cast<int>(p.m) - first_token)),
        load_chunk(rank * kParts + part),
        load_from(p.packed + (tile * blocks_per_row + load_chunk * kBlocks) * Word::kPackedBytes +
                  16 * lane),
        load_to(ptx::shared_address(slot(0))),
        slots_end(load_to + kDepth * kSlotBytes) {
    if constexpr (Word::kHasGroups) {
      constexpr int kLanes = kScaleBytes / 16;  // for 16 scales
      const bool of_scales = lane < kSides * kLanes;
      const int side = of_scales ? lane / kLanes : lane - kSides * kLanes;
      const TileScales from = scales_of(p.groups, tile, 0);
      loads_side = of_scales || (Word::kHasZeros && side < kSides);
      side_block = side * (kBlocks / kSides);
      if (of_scales) {
        side_from = reinterpret_cast<const uint8_t*>(from.scales) + lane % kLanes * 16;
        side_to = kTileBytes + side * kScaleBytes + lane % kLanes * 16;
        side_stride = kScaleBytes;
      } else {
        side_from = from.zeros;
        side_to = kTileBytes + kScalesBytes + side * kZeroBytes;
        side_stride = kZeroBytes;
      }
    }
  }

  __device__ uint32_t full(int stage) const {
    return ptx::shared_address(s_bytes + kBarriersAt) +
           (part * 2 * kMaxStages + stage) * static_cast<uint32_t>(sizeof(uint64_t));
  }
  __device__ uint32_t empty(int stage) const { return full(kMaxStages + stage); }
  __device__ uint32_t stage_address(int stage) const {
    return ptx::shared_address(s_bytes) + (part * kStages + stage) * kStageBytes;
  }
  __device__ uint8_t* slot(int i) const {
    return reinterpret_cast<uint8_t*>(s_bytes) + kSlotsAt + (warp * kDepth + i) * kSlotBytes;
  }
  // The i-th chunk of this part.
  __device__ int chunk_of(int i) const { return rank * kParts + part + i * splits * kParts; }
  __device__ bool fills() const { return warp % kWarpsOfPart == 0; }  // stages of its part

  // Barriers, and the first weights on their way.
  __device__ void prepare() {
    if (fills() && lane == 0) {
      for (int i = 0; i < kStages; ++i) {
        ptx::mbarrier_init(full(i), 1);
        ptx::mbarrier_init(empty(i), kWarpsOfPart);
      }
      ptx::fence_mbarrier_init();
      ptx::prefetch_tensor_map(x_map);
    }
#pragma unroll
    for (int i = 0; i < kDepth - 1; ++i) load_weights();
    __syncthreads();
  }

  // The next chunk of this warp's tile into its next slot. Of a last chunk that is not whole, what
  // is not there meets zeros of x: it must be finite, so it is zeros.
  __device__ void load_weights() {
    if (load_chunk < num_chunks && has_tile) {
      const int blocks = blocks_per_row - load_chunk * kBlocks;
      const int num_bytes = min(kBlocks, blocks) * Word::kPackedBytes;
      const uint32_t to = load_to + 16 * lane;
#pragma unroll
      for (int first = 0; first < kTileBytes; first += 16 * kWarpSize) {
        const bool whole = first + 16 * kWarpSize <= kTileBytes;
        if (whole || first + 16 * lane < kTileBytes) {
          ptx::cp_async_16_or_zeros(to + first, load_from + first, first + 16 * lane < num_bytes);
        }
      }
      if constexpr (Word::kHasGroups) {
        if (loads_side) {
          const bool valid = side_block < blocks;
          const int block = load_chunk * kBlocks + (valid ? side_block : 0);
          ptx::cp_async_16_or_zeros(load_to + side_to,
                                    side_from + (block >> p.groups.shift) * side_stride, valid);
        }
      }
    }
    ptx::cp_async_commit();
    load_chunk += splits * kParts;
    load_from += int64_t{splits} * kParts * kTileBytes;
    load_to += kSlotBytes;
    if (load_to == slots_end) load_to -= kDepth * kSlotBytes;
  }

  // Of one warp: the boxes of x of a step of this part, counted from 0, into a stage.
  __device__ void load_tokens(int step, int stage) const {
    const int chunk = chunk_of(step / kSteps);
    if (chunk >= num_chunks || lane != 0) return;
    ptx::mbarrier_arrive_expect(full(stage), kStageBytes);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      ptx::tma_load_2d(stage_address(stage) + box * kBoxBytes, x_map, full(stage),
                       chunk * kChunk + step % kSteps * kStep + box * kColumns, first_token);
    }
  }

  // A stage is filled again kLag steps after it was read: with stages to spare the warp that does
  // it need not wait for the slowest.
  static constexpr int kLag = kStages > 2 ? 2 : 1;
  static constexpr int kAhead = kStages - kLag;

  struct Ring {
    int stage = 0, parity = 0;               // of the step at hand
    int target = kAhead, target_parity = 1;  // of the stage that is filled meanwhile
    int step = 0;

    __device__ void advance() {
      ++step;
      if (++stage == kStages) stage = 0, parity ^= 1;
      if (++target == kStages) target = 0, target_parity ^= 1;
    }
  };

  __device__ void multiply() {
    if (kExactCodes || chunk_of(0) >= num_chunks) {
#pragma unroll
      for (float& sum : sums) sum = 0;
    }
    if (chunk_of(0) >= num_chunks) return;
    if (fills()) {
      for (int i = 0; i < kAhead; ++i) load_tokens(i, i);
      __syncwarp();
    }
    Ring ring;
    RunFragments a[2];  // of the run at hand and of the next
    const uint8_t* weights = slot(0);
    const uint8_t* const end = slot(kDepth);
    ptx::cp_async_wait<kDepth - 2>();
    __syncwarp();
    Codes codes{};
    load_codes(weights, 0, codes);
    decode(weights, 0, codes, a[0]);
    for (int chunk = chunk_of(0); chunk < num_chunks; chunk += splits * kParts) {
      const uint8_t* next = weights + kSlotBytes == end ? slot(0) : weights + kSlotBytes;
      const bool is_last = chunk + splits * kParts >= num_chunks;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        multiply_step(weights, is_last ? nullptr : next, step, ring, a);
        ring.advance();
      }
      weights = next;
    }
    if constexpr (!kExactCodes) {
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(sums);
    }
  }

  // Step `step` of a chunk, whose first run is decoded; decodes the first run of what follows: the
  // rest of the chunk, or `next`.
  __device__ void multiply_step(const uint8_t* weights, const uint8_t* next, int step, Ring& ring,
                                RunFragments (&a)[2]) {
    const uint64_t x = ptx::k_major_descriptor(stage_address(ring.stage));
    [[maybe_unused]] float products[kExactCodes ? kTokens / 2 : 1];
    ptx::mbarrier_wait(full(ring.stage), ring.parity);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      ptx::wgmma_fence();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = Weights::first_weight(run) % kStep + 16 * half;
        const int offset = column / kColumns * kBoxBytes + column % kColumns * int{sizeof(T)};
        const bool inside = run != 0 || half != 0;
        if constexpr (kExactCodes) {
          ptx::wgmma_registers_k_major<T, kTokens>(products, a[run % 2][half], x + (offset >> 4),
                                                   inside);
        } else {
          ptx::wgmma_registers_k_major<T, kTokens>(sums, a[run % 2][half], x + (offset >> 4),
                                                   inside || ring.step != 0);
        }
      }
      ptx::wgmma_commit();
      const bool inside_chunk = run + 1 < kRuns || step + 1 < kSteps;
      if (!inside_chunk && next != nullptr) {
        ptx::cp_async_wait<kDepth - 2>();
        __syncwarp();
      }
      const uint8_t* from = inside_chunk ? weights : next;
      const int of_chunk = inside_chunk ? step * kRuns + run + 1 : 0;
      Codes codes{};
      if (from != nullptr) load_codes(from, of_chunk, codes);
      ptx::wgmma_wait<1>();  // the fragments before these are free
      if (from != nullptr) decode(from, of_chunk, codes, a[(run + 1) % 2]);
      if (run == 0) {
        if (!kExactCodes && ring.step > 0) release(ring.stage == 0 ? kStages - 1 : ring.stage - 1);
        refill(ring);
        if (step == 0) load_weights();
      }
    }
    if constexpr (kExactCodes) {
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(products);
      release(ring.stage);
      add_scaled(weights, products);
    }
  }

  __device__ void release(int stage) const {
    if (lane == 0) ptx::mbarrier_arrive(empty(stage));
  }
  __device__ void refill(const Ring& ring) const {
    if (fills()) {
      if (ring.step >= kLag) ptx::mbarrier_wait(empty(ring.target), ring.target_parity);
      load_tokens(ring.step + kAhead, ring.target);
    }
    __syncwarp();
  }

  // What decode takes beside the weights: where codes are multiplied, their words, whose way from
  // shared memory is then over.
  struct None {};
  using Codes = std::conditional_t<kExactCodes, CodeWords, None>;
  __device__ void load_codes(const uint8_t* weights, int run, Codes& codes) const {
    if constexpr (kExactCodes) {
      codes.load(weights + run * Word::kPackedBytes + Word::kQuants, lane);
    }
  }
  __device__ void decode(const uint8_t* weights, int run, const Codes& codes,
                         RunFragments& a) const {
    const uint8_t* scales = weights + kTileBytes;
    if constexpr (kExactCodes) {
      uint32_t zeros = 0;
      if constexpr (Word::kHasZeros) {
        zeros = *reinterpret_cast<const uint16_t*>(scales + kScalesBytes + lane / 4 * 2);
      }
      code_fragments<T, kFormat>(codes, lane, zeros, a);
    } else {
      TileScales side{};
      if constexpr (Word::kHasGroups) {
        side = {reinterpret_cast<const float*>(scales + run * kScaleBytes),
                scales + kScalesBytes + run * kZeroBytes};
      }
      Weights::decode(weights, run, lane, side, value_of_lane, a);
    }
  }

  __device__ void add_scaled(const uint8_t* weights, const float (&products)[kTokens / 2]) {
    const auto scale = *reinterpret_cast<const float2*>(weights + kTileBytes + lane / 4 * 8);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      sums[i] = fmaf(i % 4 < 2 ? scale.x : scale.y, products[i], sums[i]);
    }
  }

  __device__ void reduce_and_store() {
    float* s_sums = reinterpret_cast<float*>(s_bytes);
    __syncthreads();  // the stages are free
    const int row = warp % kWarpsOfPart * kTileRows + lane / 4 * 2;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = 8 * j + lane % 4 * 2 + e;
        *reinterpret_cast<float2*>(s_sums + part * kPartFloats + token * kSumColumns + row) =
            float2{sums[4 * j + e], sums[4 * j + 2 + e]};
      }
    }
    __syncthreads();
    constexpr int kFours = kRows / 4;
    const bool shared = splits > 1;
    if (!shared || kParts > 1) {
      for (int i = threadIdx.x; i < num_tokens * kFours; i += kNumThreads) {
        const int token = i / kFours, row = i % kFours * 4;
        float* at = s_sums + token * kSumColumns + row;
        const float4 total = sum_of_parts(at);
        if (!shared) store_four(token, row, total);
        if (shared) *reinterpret_cast<float4*>(at) = total;
      }
    }
    if (!shared) return;
    ptx::cluster_sync();
    for (int i = threadIdx.x; i < num_tokens * kFours; i += kNumThreads) {
      const int token = i / kFours, row = i % kFours * 4;
      if (token % splits != rank) continue;
      const uint32_t at = ptx::shared_address(s_sums + token * kSumColumns + row);
      float4 total{};
      for (int r = 0; r < splits; ++r) add(total, ptx::load_cluster(ptx::cluster_address(at, r)));
      store_four(token, row, total);
    }
    ptx::cluster_sync();  // nobody leaves while its sums are read
  }
  static __device__ void add(float4& to, const float4& x) {
    to.x += x.x, to.y += x.y, to.z += x.z, to.w += x.w;
  }
  static __device__ float4 sum_of_parts(const float* at) {
    float4 total = *reinterpret_cast<const float4*>(at);
#pragma unroll
    for (int i = 1; i < kParts; ++i) {
      add(total, *reinterpret_cast<const float4*>(at + i * kPartFloats));
    }
    return total;
  }

  __device__ void store_four(int token, int row, const float4& four) const {
    const int64_t column = first_tile * kTileRows + row;
    T* out = static_cast<T*>(p.out) + (int64_t{first_token} + token) * p.n + column;
    const float total[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i >= p.n) return;
      const float bias =
          p.bias == nullptr ? 0 : to_float(static_cast<const T*>(p.bias)[column + i]);
      out[i] = from_float<T>(total[i] + bias);
    }
  }
};

}  // namespace llamatelemetry
