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

// n * over(d) >> 32 is n / d where n * d < 2^32 and 1 < d: items and sums of a block are so few.
constexpr uint32_t over(uint32_t divisor) { return 0xffffffffu / divisor + 1; }

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
                          Kernel::kStarts, Kernel::kTableBytes, device.max_shared_bytes,
                          stream_clusters_at_once<Kernel>(device)),
      .shared = {},
      .num_tiles = static_cast<int>((p.n + kTileRows - 1) / kTileRows),
      .num_chunks = num_chunks,
      .over_chunks = 0,
      .over_tile = over(static_cast<uint32_t>(p.m) * (kTileRows / 4)),
      .table = stream_table(kFormats[p.format].codes)};
  if (args.plan.tiles == 0) return "no block of it fits on the device";
  args.shared = stream_shared(args.plan, static_cast<int>(p.m), Kernel::kChunk, num_chunks,
                              Kernel::kColumnTiles, Kernel::kStarts, Kernel::kTableBytes);
  const int splits = args.plan.splits;
  if (splits == 1 && num_chunks > 1) args.over_chunks = over(static_cast<uint32_t>(num_chunks));
  const dim3 grid(static_cast<unsigned>(splits),
                  static_cast<unsigned>((args.num_tiles + args.plan.tiles - 1) / args.plan.tiles));
  return launch_clusters<Kernel>(splits > 1 ? splits : 0, grid, args.shared.bytes, stream, args);
}

template <typename T, int kFormat, int kScaleRuns>
Error launch_stream_format(const QuantLinearParams& p, Stream stream) {
  if (p.m <= 8) return launch_stream_kernel<QuantStream<T, kFormat, 1, kScaleRuns>>(p, stream);
  return launch_stream_kernel<QuantStream<T, kFormat, 2, kScaleRuns>>(p, stream);
}

template <typename T, StreamSet kSet>
Error launch_quant_stream(const QuantLinearParams& p, Stream stream) {
  Error error = nullptr;
  // Runs of 32 weights with one scale in an item: all of groups of 128. FP4's are mostly of 64.
  constexpr int kRuns = kSet == StreamSet::kTables ? 2 : stream_chunk(ScaleRule::kGroup) / 32;
  dispatch_format<FormatSet::kBlocks>(p.format, [&](auto format) {
    constexpr FormatDescriptor kDescriptor = kFormats[format()];
    if constexpr (stream_set(kDescriptor.codes) == kSet &&
                  serves_stream_format(kDescriptor.codes, kDescriptor.scale_rule)) {
      error = launch_stream_format<T, format(), 1>(p, stream);
    }
  });
  dispatch_format<FormatSet::kGroups>(p.format, [&](auto format) {
    constexpr FormatDescriptor kDescriptor = kFormats[format()];
    if constexpr (stream_set(kDescriptor.codes) == kSet &&
                  serves_stream_format(kDescriptor.codes, kDescriptor.scale_rule)) {
      constexpr bool kWide = kSet == StreamSet::kWide;
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
