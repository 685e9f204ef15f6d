#include "gemm/permute_columns.cuh"

#include <algorithm>

#include "tile/convert.cuh"

namespace llamatelemetry {

Error launch_permute_columns(const PermuteColumnsParams& p, Stream stream) {
  constexpr int64_t kNumThreads = 256, kMaxGridY = 65535;
  const dim3 grid(static_cast<unsigned>((p.k + kNumThreads - 1) / kNumThreads),
                  static_cast<unsigned>(std::min(p.m, kMaxGridY)));
  if (p.dtype == DType::kFloat32) {
    launch_overlapped(permute_columns_kernel<uint32_t>, grid, kNumThreads, stream, p);
  } else {
    launch_overlapped(permute_columns_kernel<uint16_t>, grid, kNumThreads, stream, p);
  }
  return last_launch_error();
}

}  // namespace llamatelemetry
