// The launch of quant_skinny.cuh for one dtype of x and one set of formats.
#pragma once

#include "gemm/choice.h"
#include "gemm/quant_skinny.cuh"
#include "tile/kernel_entry.cuh"

namespace llamatelemetry {

// Warps of a block, which share a tile's k: sixteen where there are few tiles (all blocks together
// should have loads under way on every multiprocessor), fewer where many blocks do that. Not
// many more than there are chunks, nor more than shared memory has room for.
template <typename Kernel>
int skinny_warps(const QuantLinearParams& p) {
  const DeviceFacts& device = current_device();
  const int64_t tiles = (p.n + kTileRows - 1) / kTileRows;
  const bool is_wide = tiles >= int64_t{8} * device.num_sms;
  int warps = std::min(Kernel::kNumThreads / kWarpSize, is_wide ? 4 : 16);
  const int64_t chunks = (p.k + Kernel::kChunk - 1) / Kernel::kChunk;
  while (warps > 1 &&
         (warps / 2 >= chunks || warps * Kernel::kWarpBytes > device.max_shared_bytes)) {
    warps /= 2;
  }
  return warps;
}

template <typename Kernel>
Error launch_skinny_kernel(const QuantLinearParams& p, Stream stream, int tokens, int row_tiles) {
  const int warps = skinny_warps<Kernel>(p);
  const int shared_bytes = warps * Kernel::kWarpBytes;
  if (cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           shared_bytes) != cudaSuccess) {
    return last_launch_error();
  }
  const int64_t tiles = (p.n + kTileRows - 1) / kTileRows;
  const dim3 grid(static_cast<unsigned>((tiles + row_tiles - 1) / row_tiles),
                  static_cast<unsigned>((p.m + tokens - 1) / tokens));
  launch_overlapped(kernel_entry<Kernel>, grid, warps * kWarpSize, stream, p, shared_bytes);
  return last_launch_error();
}

template <typename T, FormatSet kSet>
Error launch_quant_skinny(const QuantLinearParams& p, Stream stream) {
  Error error = nullptr;
  dispatch_format<kSet>(p.format, [&](auto format) {
    constexpr int kFormat = format();
    constexpr CodeFamily kCodes = kFormats[kFormat].codes;
    // Of these a row alone took longer by the kernel for one than 8 rows by the next: 27 against 22
    // us for Q2_K, 22 and 17 for TQ1_0, 19 and 14 for TQ2_0 (4096 to 14336 on an H200).
    constexpr bool kOneAsEight = kCodes == CodeFamily::kU2 || kCodes == CodeFamily::kTernary;
    if (p.m == 1 && !kOneAsEight) {
      if constexpr (!kOneAsEight) {
        error = launch_skinny_kernel<QuantSkinny<T, kFormat, 1, 1>>(p, stream, 1, 1);
      }
    } else if (p.m <= 8) {
      error = launch_skinny_kernel<QuantSkinny<T, kFormat, 8, 2>>(p, stream, 8, 2);
    } else {
      error = launch_skinny_kernel<QuantSkinny<T, kFormat, 16, 2>>(p, stream, 16, 2);
    }
  });
  return error;
}

}  // namespace llamatelemetry
