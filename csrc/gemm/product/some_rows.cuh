// out = a . b^T of a byte a value for 17 to 64 rows of a on Hopper, whose product is a read of b: a
// tile of 128 rows of a would be half empty, and tiles of 256 columns too few to ask all memory at
// once. A block makes one tile of 64 x kColumns: a thread copies, a warpgroup multiplies. Sums over
// 128 of k of e4m3 are added in float32, as in wgmma.cuh. Bound by L2, which gives every block all
// rows of a beside its own of b (benchmarks/notes/gemm.md). Grid [ceil(n / kColumns)].
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "gemm/product/epilogue.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_majors.cuh"
#include "tile/dependent_launch.cuh"

namespace llamatelemetry {

struct ProductSomeRowsArgs {
  ProductParams call;
  CUtensorMap a_map;  // [1, m, k], boxes of 64 rows of 128 bytes
  CUtensorMap b_map;  // [1, n, k], of kColumns rows
};

template <typename T, int kColumns, bool kBlocks = false>
struct ProductSomeRows {
  using Params = ProductSomeRowsArgs;
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int, float>;
  static constexpr bool kPromotes = std::is_same_v<T, E4M3>;
  static constexpr int kRows = 64, kDepth = 128;
  static_assert(kDepth == kScaleBlock && kScaleBlock % kColumns == 0);
  static constexpr int kNumThreads = 128 + 32;  // the last warp copies
  static constexpr int kMinBlocks = 2;
  static constexpr int kCapability = 90;
  static constexpr int kABytes = kRows * kDepth;
  static constexpr int kStageBytes = kABytes + kColumns * kDepth;
  static constexpr int kStages = 96 * 1024 / kStageBytes;
  static constexpr int kWarps = 4;
  static constexpr int kPieceColumns = 64;  // that a warp stores at a time
  using Staged = StagedRows<kPieceColumns, Sum>;

  struct Storage {
    union {
      alignas(1024) uint8_t stages[kStages][kStageBytes];
      alignas(16) uint8_t staged[kWarps][Staged::bytes()];
    };
    uint64_t full[kStages];
    uint64_t empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Storage);

  static __device__ int steps_of(const ProductParams& p) {
    return static_cast<int>((p.k + kDepth - 1) / kDepth);
  }

  static __device__ void copy(const ProductSomeRowsArgs& args, Storage& s, int column) {
    const int steps = steps_of(args.call);
    for (int i = 0; i < steps; ++i) {
      const int slot = i % kStages;
      ptx::mbarrier_wait(ptx::shared_address(&s.empty[slot]), (i / kStages & 1) ^ 1);
      const uint32_t full = ptx::shared_address(&s.full[slot]);
      const uint32_t stage = ptx::shared_address(s.stages[slot]);
      ptx::mbarrier_arrive_expect(full, kStageBytes);
      ptx::tma_load_3d(stage + kABytes, &args.b_map, full, i * kDepth, column, 0);
      ptx::tma_load_3d(stage, &args.a_map, full, i * kDepth, 0, 0);
    }
  }

  static __device__ void multiply(Sum (&sums)[kColumns / 2], uint32_t stage, bool first) {
#pragma unroll
    for (int step = 0; step < kDepth / 32; ++step) {
      const uint64_t a = ptx::k_major_descriptor(stage + 32 * step);
      const uint64_t b = ptx::k_major_descriptor(stage + kABytes + 32 * step);
      const bool accumulate = !first || step > 0;
      if constexpr (kPromotes) {
        ptx::wgmma_e4m3<kColumns>(sums, a, b, accumulate);
      } else {
        ptx::wgmma_s8<kColumns>(sums, a, b, accumulate);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(sums);
  }

  static __device__ void multiply_tile(const ProductParams& p, Storage& s, int column) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
    const int steps = steps_of(p);
    [[maybe_unused]] BlockScales scales;
    if constexpr (kBlocks) scales = BlockScales(p, 16 * warp + lane / 4, column);
    Sum sums[kColumns / 2] = {};
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const int slot = i % kStages;
      [[maybe_unused]] float2 scale{1.0f, 1.0f};
      if constexpr (kBlocks) scale = scales.of(i);
      ptx::mbarrier_wait(ptx::shared_address(&s.full[slot]), i / kStages & 1);
      const uint32_t stage = ptx::shared_address(s.stages[slot]);
      ptx::wgmma_fence();
      if constexpr (kPromotes) {
        float part[kColumns / 2];
        multiply(part, stage, true);
#pragma unroll
        for (int j = 0; j < kColumns / 2; ++j) {
          if constexpr (kBlocks) part[j] *= j % 4 < 2 ? scale.x : scale.y;
          sums[j] += part[j];
        }
      } else {
        multiply(sums, stage, i == 0);
      }
      if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&s.empty[slot]));
    }
    ptx::named_barrier_sync(1, 32 * kWarps);  // the stages are free
    Staged staged{reinterpret_cast<Sum*>(s.staged[warp])};
#pragma unroll
    for (int piece = 0; piece < kColumns / kPieceColumns; ++piece) {
#pragma unroll
      for (int j = 0; j < kPieceColumns / 8; ++j) {
        const int at = 4 * (piece * kPieceColumns / 8 + j);
        staged.put(lane, 8 * j, sums[at], sums[at + 1], sums[at + 2], sums[at + 3]);
      }
      staged.store(p, lane, 0, 16 * warp, column + piece * kPieceColumns);
    }
  }

  static __device__ void run(const ProductSomeRowsArgs& args) {
    extern __shared__ __align__(1024) uint8_t s_some_rows[];
    auto& s = *reinterpret_cast<Storage*>(s_some_rows);
    const ProductParams& p = args.call;
    const int column = static_cast<int>(blockIdx.x) * kColumns;
    let_successors_start();
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(&args.a_map);
      ptx::prefetch_tensor_map(&args.b_map);
      for (int i = 0; i < kStages; ++i) {
        ptx::mbarrier_init(ptx::shared_address(&s.full[i]), 1);
        ptx::mbarrier_init(ptx::shared_address(&s.empty[i]), kWarps);
      }
      ptx::fence_mbarrier_init();
    }
    if (threadIdx.x < kColumns) {  // the first stages of b, a line of a row each
      const int64_t row = min(int64_t{column} + threadIdx.x, p.n - 1);
      const auto* b = static_cast<const uint8_t*>(p.b.data) + row * p.b.row_stride;
      for (int i = 0; i < min(kStages, steps_of(p)); ++i) {
        ptx::prefetch_l2(b + int64_t{i} * kDepth);
      }
    }
    __syncthreads();
    wait_for_predecessors();
    if (threadIdx.x < 32 * kWarps) {
      multiply_tile(p, s, column);
    } else if (threadIdx.x == 32 * kWarps) {
      copy(args, s, column);
    }
  }
};

}  // namespace llamatelemetry
