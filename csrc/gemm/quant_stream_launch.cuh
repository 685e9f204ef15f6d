// The launch of quant_stream.cuh for a dtype of x.
#pragma once

#include <mutex>

#include "gemm/quant_stream.cuh"
#include "tile/kernel_entry.cuh"

namespace llamatelemetry {

// How many clusters of so many blocks, a block a multiprocessor, the current device runs at once.
struct StreamClusters {
  int of[kMaxStreamSplits];
};
template <typename Kernel>
StreamClusters ask_stream_clusters(const DeviceFacts& device) {
  // The groups of multiprocessors that clusters lie in have even numbers of them.
  StreamClusters clusters{{device.num_sms}};
  if (!has_stream_clusters(device.capability, device.code_capability, device.max_shared_bytes)) {
    return clusters;
  }
  clusters.of[1] = device.num_sms / 2;
  for (int blocks = 3; blocks <= max_stream_splits(8 * Kernel::kColumnTiles); ++blocks) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(Kernel::kNumThreads);
    config.dynamicSmemBytes = device.max_shared_bytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int& count = clusters.of[blocks - 1];
    if (cudaOccupancyMaxActiveClusters(&count, kernel_entry<Kernel>, &config) != cudaSuccess) {
      cudaGetLastError();
      count = 0;
    }
  }
  return clusters;
}
// Asked once a device.
template <typename Kernel>
const StreamClusters& stream_clusters(const DeviceFacts& device) {
  constexpr int kMaxDevices = 64;
  static StreamClusters clusters[kMaxDevices];
  static std::mutex mutex;
  int index = 0;
  cudaGetDevice(&index);
  const std::lock_guard lock(mutex);
  if (clusters[index].of[0] == 0) clusters[index] = ask_stream_clusters<Kernel>(device);
  return clusters[index];
}

template <typename Kernel>
Error launch_stream_kernel(const QuantLinearParams& p, Stream stream) {
  const DeviceFacts& device = current_device();
  if (cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           device.max_shared_bytes) != cudaSuccess) {
    return last_launch_error();
  }
  const StreamClusters& clusters = stream_clusters<Kernel>(device);
  const int num_chunks = static_cast<int>(p.k / Kernel::kChunk);
  // One plan for all numbers of rows but one that a kernel serves: a row's sums are then the same.
  const int64_t planned_rows = p.m == 1 ? 1 : 8 * Kernel::kColumnTiles;
  QuantStreamArgs args{
      .call = p,
      .plan = stream_plan(planned_rows, p.n, p.k, Kernel::kChunk, Kernel::kColumnTiles,
                          Kernel::kStarts, device.max_shared_bytes, clusters.of),
      .shared = {},
      .num_tiles = static_cast<int>((p.n + kTileRows - 1) / kTileRows),
      .num_chunks = num_chunks};
  if (args.plan.tiles == 0) return "no block of it fits on the device";
  args.shared = stream_shared(args.plan, static_cast<int>(p.m), Kernel::kChunk, num_chunks,
                              Kernel::kColumnTiles, Kernel::kStarts);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(args.plan.splits), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(args.plan.splits),
           static_cast<unsigned>((args.num_tiles + args.plan.tiles - 1) / args.plan.tiles));
  config.blockDim = dim3(Kernel::kNumThreads);
  config.dynamicSmemBytes = args.shared.bytes;
  config.stream = stream;
  config.attrs = attributes;
  // Code for older GPUs has no wait in it: it must not start early on a newer one either.
  config.numAttrs = device.capability < 90 || device.code_capability < 90 ? 0
                    : args.plan.splits > 1                                ? 2
                                                                          : 1;
  cudaLaunchKernelEx(&config, kernel_entry<Kernel>, args);
  return last_launch_error();
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
