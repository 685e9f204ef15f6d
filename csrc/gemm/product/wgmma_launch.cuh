// The launch of wgmma.cuh: tensor maps, the width of tiles, the grid.
#pragma once

#include <algorithm>

#include "common/device.h"
#include "gemm/product/wgmma.cuh"
#include "tile/kernel_entry.cuh"
#include "tile/tensor_map.h"

namespace llamatelemetry {

// What a tile of each width costs, in columns of the widest: narrow ones read more of a for each
// product, and every tile pays for its start and its end (benchmarks/notes/gemm.md).
struct WgmmaWidth {
  int columns;
  int cost;
};
constexpr WgmmaWidth kWgmmaWidths[] = {{256, 280}, {128, 150}, {64, 92}};

inline int wgmma_columns(const ProductParams& p, int num_sms, int max_columns) {
  const int64_t row_tiles = (p.m + kWgmmaTileRows - 1) / kWgmmaTileRows * p.batch;
  int best = 0;
  int64_t least = 0;
  for (const WgmmaWidth& width : kWgmmaWidths) {
    if (width.columns > max_columns) continue;
    const int64_t tiles = row_tiles * ((p.n + width.columns - 1) / width.columns);
    const int64_t cost = (tiles + num_sms - 1) / num_sms * width.cost;
    if (best == 0 || cost < least) best = width.columns, least = cost;
  }
  return best;
}

inline CUtensorMapDataType tensor_map_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kBFloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

// A box is 128 bytes of box_lines lines: rows where x lies along k, else steps along k. What lies
// outside reads as 0.
inline Error encode_operand(const Operand& x, const ProductParams& p, bool along_k, int box_lines,
                            CUtensorMap* map, int* batch_step) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return kNoTensorMaps;
  const int64_t bytes = dtype_bytes(p.dtype);
  const int64_t columns = along_k ? p.k : x.rows, lines = along_k ? x.rows : p.k;
  const int64_t line_stride = along_k ? x.row_stride : x.k_stride;
  *batch_step = p.batch > 1 && x.batch_stride != 0;
  // The stride of a dimension of one element means nothing and may be anything.
  const auto stride_bytes = [&](int64_t count, int64_t stride) {
    return static_cast<cuuint64_t>(count > 1 && stride > 0 ? stride * bytes : kLoadBytes);
  };
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(lines),
                               static_cast<cuuint64_t>(*batch_step ? p.batch : 1)};
  const cuuint64_t strides[2] = {stride_bytes(lines, line_stride),
                                 stride_bytes(p.batch, x.batch_stride)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(kWgmmaRowBytes / bytes),
                             static_cast<cuuint32_t>(box_lines), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult status =
      encode(map, tensor_map_type(p.dtype), 3, const_cast<void*>(x.data), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "no tensor map fits the sizes or strides of a or b";
}

template <typename T, bool kAAlongK, bool kBAlongK, int kColumns, bool kBlocks>
Error launch_wgmma(const ProductParams& p, Stream stream) {
  using Kernel = ProductWgmma<T, kAAlongK, kBAlongK, kColumns, kBlocks>;
  if (cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           Kernel::kSharedBytes) != cudaSuccess) {
    return last_launch_error();
  }
  ProductWgmmaArgs args{};
  args.call = p;
  args.num_tiles =
      (p.m + kWgmmaTileRows - 1) / kWgmmaTileRows * ((p.n + kColumns - 1) / kColumns) * p.batch;
  if (const Error error = encode_operand(p.a, p, kAAlongK, kAAlongK ? kWgmmaTileRows : 64,
                                         &args.a_map, &args.a_batch_step)) {
    return error;
  }
  if (const Error error = encode_operand(p.b, p, kBAlongK, kBAlongK ? kColumns : 64, &args.b_map,
                                         &args.b_batch_step)) {
    return error;
  }
  const int64_t grid = std::min<int64_t>(args.num_tiles, current_device().num_sms);
  launch_overlapped(kernel_entry<Kernel>, dim3(static_cast<unsigned>(grid)), Kernel::kNumThreads,
                    stream, args, Kernel::kSharedBytes);
  return last_launch_error();
}

template <typename T, bool kAAlongK, bool kBAlongK, bool kBlocks = false>
Error launch_wgmma_width(const ProductParams& p, Stream stream) {
  // Of e4m3 the sums of a stage take as many registers as the others.
  constexpr int kMaxColumns = std::is_same_v<T, E4M3> ? 128 : 256;
  switch (wgmma_columns(p, current_device().num_sms, kMaxColumns)) {
    case 256:
      if constexpr (kMaxColumns >= 256) {
        return launch_wgmma<T, kAAlongK, kBAlongK, 256, kBlocks>(p, stream);
      }
      [[fallthrough]];
    case 128: return launch_wgmma<T, kAAlongK, kBAlongK, 128, kBlocks>(p, stream);
    default: return launch_wgmma<T, kAAlongK, kBAlongK, 64, kBlocks>(p, stream);
  }
}

// Of two bytes: whichever way the operands lie.
template <typename T>
Error launch_wgmma_layouts(const ProductParams& p, Stream stream) {
  const auto along_k = [&](const Operand& x) {
    return layout_of(x, p.batch, p.k, sizeof(T)) == OperandLayout::kAlongK;
  };
  if (along_k(p.a)) {
    return along_k(p.b) ? launch_wgmma_width<T, true, true>(p, stream)
                        : launch_wgmma_width<T, true, false>(p, stream);
  }
  return along_k(p.b) ? launch_wgmma_width<T, false, true>(p, stream)
                      : launch_wgmma_width<T, false, false>(p, stream);
}

}  // namespace llamatelemetry
