#include "gemm/product/few_rows.cuh"

#include "gemm/product/choice.h"
#include "tile/kernel_entry.cuh"

namespace llamatelemetry {
namespace {

template <typename T, bool kBlocks>
Error start(const ProductParams& p, Stream stream) {
  constexpr int kColumns = ProductFewRows<T, 1>::kColumns,
                kThreads = ProductFewRows<T, 1>::kNumThreads;
  const dim3 grid(static_cast<unsigned>((p.n + kColumns - 1) / kColumns));
  if (p.m <= 8) {
    launch_overlapped(kernel_entry<ProductFewRows<T, 1, kBlocks>>, grid, kThreads, stream, p);
  } else {
    launch_overlapped(kernel_entry<ProductFewRows<T, 2, kBlocks>>, grid, kThreads, stream, p);
  }
  return last_launch_error();
}

}  // namespace

Error launch_product_few_rows(const ProductParams& p, Stream stream) {
  if (p.dtype == DType::kInt8) return start<int8_t, false>(p, stream);
  return p.row_blocks ? start<E4M3, true>(p, stream) : start<E4M3, false>(p, stream);
}

}  // namespace llamatelemetry
