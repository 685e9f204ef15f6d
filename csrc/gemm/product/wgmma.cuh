// out = a . b^T on Hopper: persistent blocks of a thread that copies and two warpgroups that
// multiply, 64 rows of a tile of 128 x kColumns each. Both operands come by TMA as rows of 128
// bytes, swizzled, and go to wgmma from shared memory, whichever way they lie: along k or along
// their rows. Bound by the tensor cores: 64 x 256 x 16 take 128 cycles, and the 10 KiB that they
// read of shared memory 80. While a tile is stored, copies of the next one are under way.
// Grid: at most one block per multiprocessor.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "gemm/product/choice.h"
#include "gemm/product/epilogue.cuh"
#include "ptx/shared.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_majors.cuh"
#include "tile/dependent_launch.cuh"

namespace llamatelemetry {

struct ProductWgmmaArgs {
  ProductParams call;
  CUtensorMap a_map;  // [batch, m, k], or [batch, k, m] where a lies along its rows
  CUtensorMap b_map;
  int a_batch_step;  // 0 where one matrix serves the batch
  int b_batch_step;
  int64_t num_tiles;
};

constexpr int kWgmmaRowBytes = 128;  // of k, or of rows, in an atom of 8 lines
constexpr int kWgmmaTileRows = 128;
constexpr int kWgmmaGroups = 2;
constexpr int kWgmmaBoxBytes = 64 * kWgmmaRowBytes;  // 64 lines along k of 64 rows of two bytes

// How an operand of kRows rows lies in a stage, and how it comes there.
template <typename T, bool kAlongK, int kRows>
struct WgmmaOperand {
  static constexpr int kDepth = kWgmmaRowBytes / static_cast<int>(sizeof(T));  // of k in a stage
  static constexpr int kBytes = kRows * kWgmmaRowBytes;
  static_assert(kAlongK || sizeof(T) == 2);

  static __device__ void copy(const CUtensorMap& map, uint32_t to, uint32_t full, int64_t first_row,
                              int64_t first_k, int batch) {
    const int row = static_cast<int>(first_row), depth = static_cast<int>(first_k);
    if constexpr (kAlongK) {
      ptx::tma_load_3d(to, &map, full, depth, row, batch);
    } else {
#pragma unroll
      for (int i = 0; i < kRows / 64; ++i) {
        ptx::tma_load_3d(to + i * kWgmmaBoxBytes, &map, full, row + 64 * i, depth, batch);
      }
    }
  }
  // Of the rows from a multiple of 64 on, at step `step` of 32 bytes of k, 16 lines along rows.
  static __device__ uint64_t descriptor(uint32_t stage, int row, int step) {
    if constexpr (kAlongK) {
      return ptx::k_major_descriptor(stage + row * kWgmmaRowBytes + 32 * step);
    } else {
      return ptx::mn_major_descriptor(
          stage + row / 64 * kWgmmaBoxBytes + 16 * step * kWgmmaRowBytes, kWgmmaBoxBytes);
    }
  }
};

// kBlocks: of e4m3, whether the sums of a stage are multiplied by the scales of its blocks.
template <typename T, bool kAAlongK, bool kBAlongK, int kColumns, bool kBlocks = false>
struct ProductWgmma {
  using Params = ProductWgmmaArgs;
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int, float>;
  using A = WgmmaOperand<T, kAAlongK, kWgmmaTileRows>;
  using B = WgmmaOperand<T, kBAlongK, kColumns>;
  // Sums over a stage of e4m3, 128 of k, are added in float32: those of wgmma keep fewer bits.
  static constexpr bool kPromotes = std::is_same_v<T, E4M3>;
  static_assert(!kBlocks || (kPromotes && A::kDepth == kScaleBlock && kScaleBlock % kColumns == 0));
  static constexpr int kNumThreads = (kWgmmaGroups + 1) * 128;
  static constexpr int kMinBlocks = 1;
  static constexpr int kCapability = 90;
  static constexpr int kTileColumns = kColumns;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kStages = 192 * 1024 / kStageBytes;
  static constexpr int kWarps = 4 * kWgmmaGroups;
  static constexpr int kPieceColumns = 64;  // that a warp stores at a time
  using Staged = StagedRows<kPieceColumns, Sum>;

  struct Storage {
    alignas(1024) uint8_t stages[kStages][kStageBytes];
    alignas(16) uint8_t staged[kWarps][Staged::bytes()];
    uint64_t full[kStages];
    uint64_t empty[kStages];
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= 227 * 1024);

  struct Ring {
    int slot = 0;
    uint32_t parity = 0;
    __device__ void advance() {
      if (++slot == kStages) slot = 0, parity ^= 1;
    }
  };

  static __device__ TilePlace place_of(const ProductParams& p, int64_t tile) {
    return tile_place(tile, (p.m + kWgmmaTileRows - 1) / kWgmmaTileRows,
                      (p.n + kColumns - 1) / kColumns);
  }
  static __device__ int64_t steps_of(const ProductParams& p) {
    return (p.k + A::kDepth - 1) / A::kDepth;
  }

  static __device__ void copy_tiles(const ProductWgmmaArgs& args, Storage& s) {
    const ProductParams& p = args.call;
    const int64_t steps = steps_of(p);
    Ring ring;
#pragma unroll 1
    for (int64_t tile = blockIdx.x; tile < args.num_tiles; tile += gridDim.x) {
      const TilePlace place = place_of(p, tile);
      const auto batch = static_cast<int>(place.batch);
#pragma unroll 1
      for (int64_t step = 0; step < steps; ++step) {
        ptx::mbarrier_wait(ptx::shared_address(&s.empty[ring.slot]), ring.parity ^ 1);
        const uint32_t full = ptx::shared_address(&s.full[ring.slot]);
        const uint32_t stage = ptx::shared_address(s.stages[ring.slot]);
        ptx::mbarrier_arrive_expect(full, kStageBytes);
        A::copy(args.a_map, stage, full, place.row * kWgmmaTileRows, step * A::kDepth,
                batch * args.a_batch_step);
        B::copy(args.b_map, stage + A::kBytes, full, place.column * kColumns, step * B::kDepth,
                batch * args.b_batch_step);
        ring.advance();
      }
    }
  }

  static __device__ void multiply(Sum (&sums)[kColumns / 2], uint32_t stage, int group,
                                  bool first) {
#pragma unroll
    for (int step = 0; step < kWgmmaRowBytes / 32; ++step) {
      const uint64_t a = A::descriptor(stage, 64 * group, step);
      const uint64_t b = B::descriptor(stage + A::kBytes, 0, step);
      const bool accumulate = !first || step > 0;
      if constexpr (std::is_same_v<T, E4M3>) {
        ptx::wgmma_e4m3<kColumns>(sums, a, b, accumulate);
      } else if constexpr (std::is_same_v<T, int8_t>) {
        ptx::wgmma_s8<kColumns>(sums, a, b, accumulate);
      } else {
        ptx::WgmmaMajors<T, kColumns, !kAAlongK, !kBAlongK>::add(sums, a, b, accumulate);
      }
    }
  }

  static __device__ void multiply_tiles(const ProductWgmmaArgs& args, Storage& s) {
    const ProductParams& p = args.call;
    const int64_t steps = steps_of(p);
    const int group = static_cast<int>(threadIdx.x) / 128 - 1, lane = threadIdx.x % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32 - 4;
    const int first_row = 64 * group + warp % 4 * 16;  // of a warp's in a tile
    Staged staged{reinterpret_cast<Sum*>(s.staged[warp])};
    const auto release = [&](int slot) {
      if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&s.empty[slot]));
    };
    Ring ring;
#pragma unroll 1
    for (int64_t tile = blockIdx.x; tile < args.num_tiles; tile += gridDim.x) {
      const TilePlace place = place_of(p, tile);
      const int64_t row = place.row * kWgmmaTileRows + first_row;
      [[maybe_unused]] BlockScales scales;
      if constexpr (kBlocks) scales = BlockScales(p, row + lane / 4, place.column * kColumns);
      Sum sums[kColumns / 2];
      int last = 0;
#pragma unroll 1
      for (int64_t step = 0; step < steps; ++step) {
        ptx::mbarrier_wait(ptx::shared_address(&s.full[ring.slot]), ring.parity);
        const uint32_t stage = ptx::shared_address(s.stages[ring.slot]);
        ptx::wgmma_fence();
        if constexpr (kPromotes) {
          float part[kColumns / 2];
          [[maybe_unused]] const float2 scale = kBlocks ? scales.of(step) : float2{1.0f, 1.0f};
          multiply(part, stage, group, true);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          ptx::wgmma_hold(part);
          release(ring.slot);
#pragma unroll
          for (int i = 0; i < kColumns / 2; ++i) {
            if constexpr (kBlocks) part[i] *= i % 4 < 2 ? scale.x : scale.y;
            sums[i] = step == 0 ? part[i] : sums[i] + part[i];
          }
        } else {
          multiply(sums, stage, group, step == 0);
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();  // the products of the stage before this one
          if (step > 0) release(last);
          last = ring.slot;
        }
        ring.advance();
      }
      if constexpr (!kPromotes) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(sums);
        release(last);
      }
#pragma unroll
      for (int piece = 0; piece < kColumns / kPieceColumns; ++piece) {
#pragma unroll
        for (int j = 0; j < kPieceColumns / 8; ++j) {
          const int at = 4 * (piece * kPieceColumns / 8 + j);
          staged.put(lane, 8 * j, sums[at], sums[at + 1], sums[at + 2], sums[at + 3]);
        }
        staged.store(p, lane, place.batch, row, place.column * kColumns + piece * kPieceColumns);
      }
    }
  }

  static __device__ void run(const ProductWgmmaArgs& args) {
    extern __shared__ __align__(1024) uint8_t s_product[];
    auto& s = *reinterpret_cast<Storage*>(s_product);
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(&args.a_map);
      ptx::prefetch_tensor_map(&args.b_map);
      for (int i = 0; i < kStages; ++i) {
        ptx::mbarrier_init(ptx::shared_address(&s.full[i]), 1);
        ptx::mbarrier_init(ptx::shared_address(&s.empty[i]), kWarps);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    let_successors_start();
    wait_for_predecessors();
    constexpr int kCopyRegisters = 40, kComputeRegisters = 232;
    if (threadIdx.x < 128) {
      ptx::setmaxnreg_dec<kCopyRegisters>();
      if (threadIdx.x == 0) copy_tiles(args, s);
    } else {
      ptx::setmaxnreg_inc<kComputeRegisters>();
      multiply_tiles(args, s);
    }
  }
};

}  // namespace llamatelemetry
