// One row for one block: loaded once, kept in registers, read again only where it is wider than
// they hold. Thread i has vectors i, i + blockDim.x, ...; the first kHeld of them in registers.
#pragma once

#include <cstdint>

#include "common/int_menu.h"
#include "ptx/dependent_launch.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/reduce.cuh"
#include "tile/vector.cuh"

namespace llamatelemetry {

// kHeld < kMaxHeld: the whole row is in registers, of at most kFewWarps warps.
constexpr int kMaxHeld = 4;
constexpr int kFewWarps = 8;

// kHeld: vectors of the row in a thread's registers.
// kWhole: the row fills the registers of at most kFewWarps warps exactly, so nothing checks bounds.
template <typename V, int kHeld, bool kWhole = false>
struct BlockRow {
  static constexpr int kWarps = kWhole || kHeld < kMaxHeld ? kFewWarps : kMaxWarps;  // at most

  const V* row;  // where vectors that are not in registers are read
  int num_vectors;
  V held[kHeld > 0 ? kHeld : 1];

  BlockRow() = default;
  // All loads are under way before the first value is used.
  __device__ BlockRow(const void* source, int row_size)
      : row(static_cast<const V*>(source)), num_vectors(row_size / V::kElements) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int i = h * blockDim.x + threadIdx.x;
      if (kWhole || i < num_vectors) held[h] = row[i];
    }
  }

  // Calls body(i, h, vector) with each of this thread's vectors, whose index is i; body may change
  // those with h < kHeld, the others (h == kHeld) are copies.
  template <typename Body>
  __device__ void for_each(Body body) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int i = h * blockDim.x + threadIdx.x;
      if (kWhole || i < num_vectors) body(i, h, held[h]);
    }
    if constexpr (kHeld == kMaxHeld && !kWhole) {
      for (int i = kHeld * blockDim.x + threadIdx.x; i < num_vectors; i += blockDim.x) {
        V vector = row[i];
        body(i, kHeld, vector);
      }
    }
  }

  // The vector that another row's for_each calls (i, h).
  __device__ V at(int i, int h) const { return h < kHeld ? held[h] : row[i]; }
};

// A row of weights beside one of which kHeld vectors are in registers: none of its own are where
// that takes more registers than there are.
template <typename V, int kHeld>
using WeightRow = BlockRow<V, kHeld == kMaxHeld ? 0 : kHeld>;

// How many of a row's elements the threads of this warp have together: no warp has none.
template <typename V>
__device__ inline int warp_row_size(int row_size) {
  const int num_vectors = row_size / V::kElements;
  int count = 0;
  for (int i = threadIdx.x / kWarpSize * kWarpSize; i < num_vectors; i += blockDim.x) {
    count += min(num_vectors - i, kWarpSize);
  }
  return count * V::kElements;
}

template <typename V>
__device__ inline void prefetch_row(const void* row, int row_size) {
  const int i = threadIdx.x * V::kElements;
  if (row != nullptr && i < row_size) {
    ptx::prefetch_l2(static_cast<const typename V::Element*>(row) + i);
  }
}

// Calls start(Type<V>, integral_constant<kHeld>, num_threads) with what suits a row of row_size Ts:
// a callback, because V and kHeld are template arguments of the kernel.
template <typename T, typename Start>
void with_block_row(int64_t row_size, bool wide, Start start) {
  const int64_t num_vectors = wide ? row_size / WideVector<T>::kElements : row_size;
  // Few vectors a thread shorten a single row; past kFewWarps more of them keep blocks small, so
  // that several share a multiprocessor and one's loads hide another's reduction.
  constexpr int kFewThreads = kFewWarps * kWarpSize;
  const int held = !wide || num_vectors > 2 * kFewThreads ? kMaxHeld
                   : num_vectors > kFewThreads            ? 2
                                                          : 1;
  const int64_t warps = (num_vectors + held * kWarpSize - 1) / (held * kWarpSize);
  const auto num_threads =
      static_cast<unsigned>(kWarpSize * (warps < kMaxWarps ? warps : kMaxWarps));
  if (!wide) {
    start(Type<Vector<T, 1>>{}, std::integral_constant<int, kMaxHeld>{}, num_threads);
  } else {
    IntMenu<1, 2, kMaxHeld>::dispatch(
        held, [&](auto kHeld) { start(Type<WideVector<T>>{}, kHeld, num_threads); });
  }
}

}  // namespace llamatelemetry
