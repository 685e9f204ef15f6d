// The launch of quant_stream.cuh for a dtype of x.
#pragma once

#include "common/per_device.h"
#include "gemm/quant_stream.cuh"
#include "tile/clusters.cuh"

namespace llamatelemetry {

// How many clusters of 1, 2, .. blocks, a block a multiprocessor, the current device runs at once.
using StreamClustersAtOnce = int[kMaxStreamSplits];
template <typename Kernel>
const StreamClustersAtOnce& stream_clusters_at_once(const DeviceFacts& device) {
  static PerDevice<StreamClustersAtOnce> at_once;
  return at_once.of_current([&device](StreamClustersAtOnce& of_device) {
    of_device[0] = device.num_sms;
    if (!has_stream_clusters(device.capability, device.code_capability, device.max_shared_bytes)) {
      return;
    }
    // The groups of multiprocessors that clusters lie in have even numbers of them.
    of_device[1] = device.num_sms / 2;
    for (int blocks = 3; blocks <= max_stream_splits(8 * Kernel::kColumnTiles); ++blocks) {
      of_device[blocks - 1] = clusters_at_once<Kernel>(blocks, device.max_shared_bytes);
    }
  });
}

template <typename Kernel>
Error launch_stream_kernel(const QuantLinearParams& p, Stream stream) {
  const DeviceFacts& device = current_device();
  if (cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           device.max_shared_bytes) != cudaSuccess) {
    return last_launch_error();
  }
  const int num_chunks = static_cast<int>(p.k / Kernel::kChunk);
  // One plan for all numbers of rows but one that a kernel serves: a row's sums are then the same.
  const int64_t planned_rows = p.m == 1 ? 1 : 8 * Kernel::kColumnTiles;
  QuantStreamArgs args{
      .call = p,
      .plan = stream_plan(planned_rows, p.n, p.k, p.gated, Kernel::kChunk, Kernel::kColumnTiles,
                          Kernel::kStarts, device.max_shared_bytes,
                          stream_clusters_at_once<Kernel>(device)),
      .shared = {},
      .num_tiles = static_cast<int>((p.n + kTileRows - 1) / kTileRows),
      .num_chunks = num_chunks};
  if (args.plan.tiles == 0) return "no block of it fits on the device";
  args.shared = stream_shared(args.plan, static_cast<int>(p.m), Kernel::kChunk, num_chunks,
                              Kernel::kColumnTiles, Kernel::kStarts);
  const int splits = args.plan.splits;
  const dim3 grid(static_cast<unsigned>(splits),
                  static_cast<unsigned>((args.num_tiles + args.plan.tiles - 1) / args.plan.tiles));
  return launch_clusters<Kernel>(splits > 1 ? splits : 0, grid, args.shared.bytes, stream, args);
}

template <typename T, int kFormat, int kScaleRuns>
Error launch_stream_format(const QuantLinearParams& p, Stream stream) {
  if (p.m <= 8) return launch_stream_kernel<QuantStream<T, kFormat, 1, kScaleRuns>>(p, stream);
  return launch_stream_kernel<QuantStream<T, kFormat, 2, kScaleRuns>>(p, stream);
}

// kWide: codes of more than four bits, which have files of their own.
template <typename T, bool kWide>
Error launch_quant_stream(const QuantLinearParams& p, Stream stream) {
  Error error = nullptr;
  constexpr int kRuns = stream_chunk(ScaleRule::kGroup) / 32;
  dispatch_format<FormatSet::kWide>(p.format, [&](auto format) {
    constexpr FormatDescriptor kDescriptor = kFormats[format()];
    if constexpr (is_wide_stream(kDescriptor.codes) == kWide &&
                  serves_stream_format(kDescriptor.codes, kDescriptor.scale_rule)) {
      error = launch_stream_format<T, format(), 1>(p, stream);
    }
  });
  dispatch_format<FormatSet::kGroups>(p.format, [&](auto format) {
    constexpr FormatDescriptor kDescriptor = kFormats[format()];
    if constexpr (is_wide_stream(kDescriptor.codes) == kWide &&
                  serves_stream_format(kDescriptor.codes, kDescriptor.scale_rule)) {
      if (kWide || (int64_t{1} << p.groups.shift) >= kRuns) {
        error = launch_stream_format<T, format(), kRuns>(p, stream);
      } else if constexpr (!kWide) {
        error = launch_stream_format<T, format(), 1>(p, stream);
      }
    }
  });
  return error;
}

}  // namespace llamatelemetry
