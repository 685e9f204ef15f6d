// The launch of quant_wgmma.cuh for a number of rows of x in a block and a set of formats.
#pragma once

#include "common/per_device.h"
#include "gemm/quant_wgmma.cuh"
#include "tile/clusters.cuh"
#include "tile/tensor_map.h"

namespace llamatelemetry {

// How many clusters of 1, 2, .. blocks of Kernel the current device runs at once.
template <typename Kernel>
const WgmmaClustersAtOnce& wgmma_clusters_at_once() {
  static PerDevice<WgmmaClustersAtOnce> at_once;
  return at_once.of_current([](WgmmaClustersAtOnce& of_device) {
    cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         Kernel::kMaxShared);
    for (int blocks = 1; blocks <= kMaxWgmmaSplits; ++blocks) {
      of_device[blocks - 1] = clusters_at_once<Kernel>(blocks, Kernel::kMaxShared);
    }
  });
}

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
Error launch_wgmma_kernel(const QuantLinearParams& p, const QuantWgmmaPlan& plan, Stream stream) {
  if (cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           Kernel::kMaxShared) != cudaSuccess) {
    return last_launch_error();
  }
  const int64_t tiles = (p.n + Kernel::kRows - 1) / Kernel::kRows;
  const int token_tiles = static_cast<int>((p.m + Kernel::kTokens - 1) / Kernel::kTokens);
  const int splits = plan.splits;
  QuantWgmmaArgs args{.call = p, .plan = plan, .token_tiles = token_tiles, .x_map = {}};
  if (const Error error = encode_tokens(p, Kernel::kTokens, &args.x_map)) return error;
  const dim3 grid(static_cast<unsigned>(tiles * token_tiles * splits));
  return launch_clusters<Kernel>(splits > 1 ? splits : 0, grid, Kernel::kSharedBytes, stream, args);
}

// Codes as they are: where a scale has at least a chunk of them, and products have accumulators of
// their own.
template <int kFormat, WgmmaConfig kConfig>
constexpr bool kCanMultiplyCodes =
    kFormats[kFormat].codes == CodeFamily::kU4 &&
    kFormats[kFormat].scale_rule == ScaleRule::kGroup &&
    (kConfig.tokens <= 64 || (kConfig.tokens == 128 && kConfig.parts == 2));

template <typename T, int kFormat, WgmmaConfig kConfig>
Error launch_wgmma_config(const QuantLinearParams& p, const QuantWgmmaPlan& plan, Stream stream) {
  if constexpr (kCanMultiplyCodes<kFormat, kConfig>) {
    if (int64_t{32} << p.groups.shift >= kWgmmaStep) {
      return launch_wgmma_kernel<QuantWgmma<T, kFormat, kConfig, true>>(p, plan, stream);
    }
  }
  return launch_wgmma_kernel<QuantWgmma<T, kFormat, kConfig, false>>(p, plan, stream);
}

template <typename T, int kFormat, int kTokens>
Error launch_wgmma_format(const QuantLinearParams& p, const QuantWgmmaPlan& plan, Stream stream) {
  constexpr CodeFamily kCodes = kFormats[kFormat].codes;
  constexpr WgmmaConfig kDeep = wgmma_config(kTokens, WgmmaShape::kDeep, kCodes);
  constexpr WgmmaConfig kWide = wgmma_config(kTokens, WgmmaShape::kWide, kCodes);
  if (plan.shape == WgmmaShape::kDeep)
    return launch_wgmma_config<T, kFormat, kDeep>(p, plan, stream);
  return launch_wgmma_config<T, kFormat, kWide>(p, plan, stream);
}

template <int kTokens, FormatSet kSet>
Error launch_quant_wgmma(const QuantLinearParams& p, const QuantWgmmaPlan& plan, Stream stream) {
  Error error = nullptr;
  dispatch_format<kSet>(p.format, [&](auto format) {
    error = p.dtype == DType::kFloat16
                ? launch_wgmma_format<Half, format(), kTokens>(p, plan, stream)
                : launch_wgmma_format<BFloat16, format(), kTokens>(p, plan, stream);
  });
  return error;
}

}  // namespace llamatelemetry
