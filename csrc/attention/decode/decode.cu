// Decode attention on CUDA: the configuration that serves head_dim.
#include "attention/decode/decode.cuh"
#include "attention/launchers.h"
#include "tile/kernel_entry.cuh"

namespace llamatelemetry {
namespace {

template <typename T, decode::Config kConfig>
Error launch(const AttentionParams& p, Stream stream) {
  using Kernel = decode::Decode<T, kConfig>;
  static_assert(Kernel::kSharedBytes == kConfig.shared_bytes());
  if (cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           Kernel::kSharedBytes) != cudaSuccess) {
    return last_launch_error();
  }
  launch_overlapped(kernel_entry<Kernel>, dim3(static_cast<unsigned>(p.plan.num_blocks)),
                    Kernel::kNumThreads, stream, p, Kernel::kSharedBytes);
  return last_launch_error();
}

template <decode::Config kConfig>
Error launch(const AttentionParams& p, Stream stream) {
  return p.dtype == DType::kFloat16 ? launch<Half, kConfig>(p, stream)
                                    : launch<BFloat16, kConfig>(p, stream);
}

}  // namespace

Error launch_decode(const AttentionParams& p, Stream stream) {
  using decode::kConfigs;
  if (p.head_dim <= 64) return launch<kConfigs[0]>(p, stream);
  if (p.head_dim <= 96) return launch<kConfigs[1]>(p, stream);
  if (p.head_dim <= 128) return launch<kConfigs[2]>(p, stream);
  if (p.head_dim <= 192) return launch<kConfigs[3]>(p, stream);
  return launch<kConfigs[4]>(p, stream);
}

}  // namespace llamatelemetry
