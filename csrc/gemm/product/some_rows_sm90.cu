// The launch of some_rows.cuh.
#include "gemm/product/choice.h"
#include "gemm/product/some_rows.cuh"
#include "gemm/product/wgmma_launch.cuh"

namespace llamatelemetry {
namespace {

template <typename T, int kColumns, bool kBlocks>
Error start(const ProductParams& p, Stream stream) {
  using Kernel = ProductSomeRows<T, kColumns, kBlocks>;
  if (cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           Kernel::kSharedBytes) != cudaSuccess) {
    return last_launch_error();
  }
  ProductSomeRowsArgs args{};
  args.call = p;
  int batch_step = 0;  // of one product
  if (const Error error = encode_operand(p.a, p, true, Kernel::kRows, &args.a_map, &batch_step)) {
    return error;
  }
  if (const Error error = encode_operand(p.b, p, true, kColumns, &args.b_map, &batch_step)) {
    return error;
  }
  const auto tiles = static_cast<unsigned>((p.n + kColumns - 1) / kColumns);
  launch_overlapped(kernel_entry<Kernel>, dim3(tiles), Kernel::kNumThreads, stream, args,
                    Kernel::kSharedBytes);
  return last_launch_error();
}

template <typename T, bool kBlocks = false>
Error start_width(const ProductParams& p, Stream stream) {
  return has_narrow_tiles(p.n, current_device().num_sms) ? start<T, 64, kBlocks>(p, stream)
                                                         : start<T, 128, kBlocks>(p, stream);
}

}  // namespace

Error launch_product_some_rows(const ProductParams& p, Stream stream) {
  if (p.dtype == DType::kInt8) return start_width<int8_t>(p, stream);
  return p.row_blocks ? start_width<E4M3, true>(p, stream) : start_width<E4M3>(p, stream);
}

}  // namespace llamatelemetry
