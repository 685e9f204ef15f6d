#include "gemm/choice.h"
#include "gemm/quant_linear.cuh"

namespace llamatelemetry {
namespace {

constexpr int kNumThreads = 256;

template <int kFormat, int kRows>
void launch(const QuantLinearParams& p, Stream stream) {
  const int64_t four = p.dtype == DType::kFloat32 ? 16 : 8;  // bytes of four elements
  const bool x_aligned = reinterpret_cast<uintptr_t>(p.x) % four == 0 && p.x_row_stride % 4 == 0;
  const int64_t num_tiles = (p.n + kTileRows - 1) / kTileRows;
  const auto grid = static_cast<unsigned>(num_tiles * ((p.m + kRows - 1) / kRows));
  quant_linear_kernel<kFormat, kRows, kNumThreads><<<grid, kNumThreads, 0, stream>>>(p, x_aligned);
}

}  // namespace

int64_t quant_linear_workspace_bytes(const QuantLinearParams&) { return 0; }

Error launch_quant_linear(const QuantLinearParams& p, Stream stream) {
  if (p.impl == QuantLinearImpl::kSkinny) {
    return p.dtype == DType::kFloat16 ? launch_quant_skinny_f16(p, stream)
                                      : launch_quant_skinny_bf16(p, stream);
  }
#ifdef LT_SM90
  if (p.impl == QuantLinearImpl::kWgmma) {
    switch (wgmma_tokens(p.m)) {
      case 16: return launch_quant_wgmma_16(p, stream);
      case 32: return launch_quant_wgmma_32(p, stream);
      case 64: return launch_quant_wgmma_64(p, stream);
      default: return launch_quant_wgmma_128(p, stream);
    }
  }
#endif
  dispatch_format(p.format, [&](auto format) {
    if (p.m == 1) {
      launch<format(), 1>(p, stream);
    } else {
      launch<format(), kMaxFusedRows>(p, stream);
    }
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
