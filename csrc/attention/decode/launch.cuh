// Launching decode kernels: the configuration that serves head_dim.
#pragma once

#include "attention/decode/decode.cuh"
#include "attention/launchers.h"
#include "tile/kernel_entry.cuh"

namespace llamatelemetry::decode {

template <typename Kernel>
Error launch(const AttentionParams& p, Stream stream) {
  if (cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           Kernel::kSharedBytes) != cudaSuccess) {
    return last_launch_error();
  }
  launch_overlapped(kernel_entry<Kernel>, dim3(static_cast<unsigned>(p.plan.num_blocks)),
                    Kernel::kNumThreads, stream, p, Kernel::kSharedBytes);
  return last_launch_error();
}

template <typename T, Config kConfig, bool kFixed>
Error launch(const AttentionParams& p, Stream stream) {
  using Kernel = Decode<T, kConfig, kFixed>;
  static_assert(Kernel::kSharedBytes == kConfig.shared_bytes());
  return launch<Kernel>(p, stream);
}

template <Config kConfig, bool kFixed>
Error launch(const AttentionParams& p, Stream stream) {
  if constexpr (kConfig.capability < 80) {  // why_not lets float16 pass alone
    return launch<Half, kConfig, kFixed>(p, stream);
  } else {
    return p.dtype == DType::kFloat16 ? launch<Half, kConfig, kFixed>(p, stream)
                                      : launch<BFloat16, kConfig, kFixed>(p, stream);
  }
}

template <bool kFixed, const Config (&kTable)[5] = kConfigs>
Error launch_any_width(const AttentionParams& p, Stream stream) {
  if (p.head_dim <= 64) return launch<kTable[0], kFixed>(p, stream);
  if (p.head_dim <= 96) return launch<kTable[1], kFixed>(p, stream);
  if (p.head_dim <= 128) return launch<kTable[2], kFixed>(p, stream);
  if (p.head_dim <= 192) return launch<kTable[3], kFixed>(p, stream);
  return launch<kTable[4], kFixed>(p, stream);
}

// kTable: the configurations of a storage of 8 bits.
template <const Config (&kTable)[4], bool kFixed>
Error launch_8_bit(const AttentionParams& p, Stream stream) {
  if (p.head_dim <= 64) return launch<kTable[0], kFixed>(p, stream);
  if (p.head_dim <= 128) return launch<kTable[1], kFixed>(p, stream);
  if (p.head_dim <= 192) return launch<kTable[2], kFixed>(p, stream);
  return launch<kTable[3], kFixed>(p, stream);
}
template <const Config (&kTable)[4]>
Error launch_8_bit(const AttentionParams& p, Stream stream) {
  return p.plan.fixed_splits ? launch_8_bit<kTable, true>(p, stream)
                             : launch_8_bit<kTable, false>(p, stream);
}

}  // namespace llamatelemetry::decode
