// The launch of a product, its plain kernel, and the copy of rows that no kernel can load.
#include "common/device.h"
#include "gemm/product/choice.h"
#include "gemm/product/pack_rows.cuh"
#include "gemm/product/simt.cuh"
#include "tile/kernel_entry.cuh"

namespace llamatelemetry {
namespace {

template <typename Kernel>
Error start(const ProductParams& p, Stream stream) {
  const int64_t tiles = (p.m + Kernel::kTileRows - 1) / Kernel::kTileRows *
                        ((p.n + Kernel::kTileColumns - 1) / Kernel::kTileColumns);
  kernel_entry<Kernel>
      <<<dim3(static_cast<unsigned>(tiles * p.batch)), Kernel::kNumThreads, 0, stream>>>(p);
  return last_launch_error();
}

template <typename T>
Error start_simt(const ProductParams& p, Stream stream) {
  const int64_t large_tiles = (p.m + 127) / 128 * ((p.n + 127) / 128) * p.batch;
  // Fewer large tiles than two a multiprocessor leave some idle: small ones divide better.
  return large_tiles < int64_t{2} * current_device().num_sms
             ? start<ProductSimt<T, 64, 64, 1>>(p, stream)
             : start<ProductSimt<T, 128, 128, 2>>(p, stream);
}

}  // namespace

Error launch_product(const ProductParams& p, Stream stream) {
  if (has_few_rows(p)) return launch_product_few_rows(p, stream);
  switch (p.impl) {
    case ProductImpl::kSimt: {
      Error error = nullptr;
      dispatch_dtype(p.dtype, [&](auto type) {
        error = start_simt<typename decltype(type)::type>(p, stream);
      });
      return error;
    }
    case ProductImpl::kSm75: return launch_product_sm75(p, stream);
    case ProductImpl::kSm80: return launch_product_sm80(p, stream);
    case ProductImpl::kSm90: break;
    case ProductImpl::kCpu: return "a product on a GPU must not be the CPU's";
  }
#ifdef LT_SM90
  if (has_some_rows(p)) return launch_product_some_rows(p, stream);
  switch (p.dtype) {
    case DType::kFloat16: return launch_product_wgmma_f16(p, stream);
    case DType::kBFloat16: return launch_product_wgmma_bf16(p, stream);
    case DType::kFloat8E4M3: return launch_product_wgmma_e4m3(p, stream);
    default: return launch_product_wgmma_s8(p, stream);
  }
#else
  return "this build has no code for 9.0";
#endif
}

Error launch_pack_rows(const PackRowsParams& p, Stream stream) {
  constexpr int64_t kMaxGridY = 65535;
  const int64_t k_tiles = (p.padded_k + kPackTile - 1) / kPackTile;
  const int64_t row_tiles = (p.from.rows + kPackTile - 1) / kPackTile * p.batch;
  const dim3 grid(static_cast<unsigned>(row_tiles),
                  static_cast<unsigned>(k_tiles < kMaxGridY ? k_tiles : kMaxGridY));
  if (p.widens) {
    pack_rows_kernel<E4M3, Half><<<grid, kPackThreads, 0, stream>>>(p);
    return last_launch_error();
  }
  switch (p.element_bytes) {
    case 1: pack_rows_kernel<uint8_t, uint8_t><<<grid, kPackThreads, 0, stream>>>(p); break;
    case 2: pack_rows_kernel<uint16_t, uint16_t><<<grid, kPackThreads, 0, stream>>>(p); break;
    default: pack_rows_kernel<uint32_t, uint32_t><<<grid, kPackThreads, 0, stream>>>(p);
  }
  return last_launch_error();
}

}  // namespace llamatelemetry
