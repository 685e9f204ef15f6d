#include "gemm/product/choice.h"
#include "gemm/product/mma.cuh"
#include "tile/kernel_entry.cuh"

namespace llamatelemetry {
namespace {

template <typename Kernel>
Error start(const ProductParams& p, Stream stream) {
  if (cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           Kernel::kSharedBytes) != cudaSuccess) {
    return last_launch_error();
  }
  const int64_t tiles = (p.m + kMmaTile - 1) / kMmaTile * ((p.n + kMmaTile - 1) / kMmaTile);
  kernel_entry<Kernel><<<dim3(static_cast<unsigned>(tiles * p.batch)), Kernel::kNumThreads,
                         Kernel::kSharedBytes, stream>>>(p);
  return last_launch_error();
}

template <typename T, int kArch>
Error start_layouts(const ProductParams& p, Stream stream) {
  if constexpr (!takes_rows(sizeof(T) == 1 ? DType::kInt8 : DType::kFloat16)) {
    return start<ProductMmaKernel<T, true, true, kArch>>(p, stream);
  } else {
    const auto along_k = [&](const Operand& x) {
      return layout_of(x, p.batch, p.k, sizeof(T)) == OperandLayout::kAlongK;
    };
    if (along_k(p.a)) {
      return along_k(p.b) ? start<ProductMmaKernel<T, true, true, kArch>>(p, stream)
                          : start<ProductMmaKernel<T, true, false, kArch>>(p, stream);
    }
    return along_k(p.b) ? start<ProductMmaKernel<T, false, true, kArch>>(p, stream)
                        : start<ProductMmaKernel<T, false, false, kArch>>(p, stream);
  }
}

}  // namespace

Error launch_product_sm75(const ProductParams& p, Stream stream) {
  if (p.row_blocks) return start<ProductMmaKernel<Half, true, true, 75, true>>(p, stream);
  return p.dtype == DType::kInt8 ? start_layouts<int8_t, 75>(p, stream)
                                 : start_layouts<Half, 75>(p, stream);
}

Error launch_product_sm80(const ProductParams& p, Stream stream) {
  if (p.row_blocks) return start<ProductMmaKernel<Half, true, true, 80, true>>(p, stream);
  switch (p.dtype) {
    case DType::kInt8: return start_layouts<int8_t, 80>(p, stream);
    case DType::kBFloat16: return start_layouts<BFloat16, 80>(p, stream);
    default: return start_layouts<Half, 80>(p, stream);
  }
}

}  // namespace llamatelemetry
