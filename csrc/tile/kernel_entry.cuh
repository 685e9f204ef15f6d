// The one __global__ of kernels that are written as a struct: its body is compiled for the
// architectures it needs, elsewhere it traps.
#pragma once

namespace llamatelemetry {

// Kernel has Params, kNumThreads, kMinBlocks (on a multiprocessor), kCapability (80 for 8.0) and
// static void run(const Params&).
template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kNumThreads, Kernel::kMinBlocks)
    kernel_entry(const __grid_constant__ typename Kernel::Params params) {
#ifdef __CUDA_ARCH__
  if constexpr (__CUDA_ARCH__ >= 10 * Kernel::kCapability) {
    Kernel::run(params);
  } else {
    __trap();
  }
#endif
}

}  // namespace llamatelemetry
