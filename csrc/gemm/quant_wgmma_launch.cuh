// The launch of quant_wgmma.cuh for a number of rows of x in a block and a set of formats.
#pragma once

#include <mutex>

#include "gemm/quant_wgmma.cuh"
#include "tile/kernel_entry.cuh"
#include "tile/tensor_map.h"

namespace llamatelemetry {

// How many clusters of each size the current device runs at once: asked once a device.
template <typename Kernel>
class ClusterSlots {
 public:
  using Counts = int[kMaxWgmmaSplits];
  static const Counts& of_device() {
    constexpr int kMaxDevices = 64;
    static ClusterSlots slots[kMaxDevices];
    static std::mutex mutex;
    int device = 0;
    cudaGetDevice(&device);
    const std::lock_guard lock(mutex);
    if (!slots[device].asked_) slots[device].ask();
    return slots[device].counts_;
  }

 private:
  void ask() {
    asked_ = true;
    for (int blocks = 1; blocks <= kMaxWgmmaSplits; ++blocks) {
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(blocks));
      config.blockDim = dim3(Kernel::kNumThreads);
      config.dynamicSmemBytes = Kernel::kSharedBytes;
      config.attrs = &cluster;
      config.numAttrs = 1;
      int& count = counts_[blocks - 1];
      if (cudaOccupancyMaxActiveClusters(&count, kernel_entry<Kernel>, &config) != cudaSuccess) {
        cudaGetLastError();
        count = 0;
      }
    }
  }
  bool asked_ = false;
  Counts counts_;
};

// Boxes of 64 columns of `tokens` rows of x, swizzled; what lies outside reads as 0.
inline Error encode_tokens(const QuantLinearParams& p, int tokens, CUtensorMap* map) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return kNoTensorMaps;
  constexpr cuuint64_t kElementBytes = 2;
  const auto k = static_cast<cuuint64_t>(p.k);
  const cuuint64_t sizes[2] = {k, static_cast<cuuint64_t>(p.m)};
  // The stride of one row means nothing and may be anything.
  const cuuint64_t strides[1] = {kElementBytes *
                                 (p.m > 1 ? static_cast<cuuint64_t>(p.x_row_stride) : k)};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(tokens)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status =
      encode(map,
             p.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
             2, const_cast<void*>(p.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "no tensor map fits the strides of x";
}

template <typename Kernel>
Error launch_wgmma_kernel(const QuantLinearParams& p, Stream stream) {
  if (cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           Kernel::kSharedBytes) != cudaSuccess) {
    return last_launch_error();
  }
  const int64_t tiles = (p.n + Kernel::kRows - 1) / Kernel::kRows;
  const int64_t token_tiles = (p.m + Kernel::kTokens - 1) / Kernel::kTokens;
  const int64_t chunks = (p.k + Kernel::kChunk - 1) / Kernel::kChunk;
  QuantWgmmaArgs args{.call = p, .x_map = {}};
  if (const Error error = encode_tokens(p, Kernel::kTokens, &args.x_map)) return error;
  int& splits = args.call.splits;
  splits = wgmma_splits(tiles, chunks, Kernel::kChunk, ClusterSlots<Kernel>::of_device());
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(splits), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tiles * splits), static_cast<unsigned>(token_tiles));
  config.blockDim = dim3(Kernel::kNumThreads);
  config.dynamicSmemBytes = Kernel::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  cudaLaunchKernelEx(&config, kernel_entry<Kernel>, args);
  return last_launch_error();
}

template <int kTokens, FormatSet kSet>
Error launch_quant_wgmma(const QuantLinearParams& p, Stream stream) {
  Error error = nullptr;
  dispatch_format<kSet>(p.format, [&](auto format) {
    constexpr QuantWgmmaConfig kConfig = wgmma_config(kTokens, kFormats[format()].codes);
    if (p.dtype == DType::kFloat16) {
      error = launch_wgmma_kernel<QuantWgmma<Half, format(), kConfig>>(p, stream);
    } else {
      error = launch_wgmma_kernel<QuantWgmma<BFloat16, format(), kConfig>>(p, stream);
    }
  });
  return error;
}

}  // namespace llamatelemetry
