// Streams, errors and the dispatch key of the two libraries. The sources of a room's ops are
// compiled once for each: without LT_CUDA into libllamatelemetry_cpu.so, with it into
// libllamatelemetry_cuda.so. Free of torch, so kernel files include it too. What else differs by
// LT_CUDA: the guard and the allocation (binding/stable.h) and the 16-bit types (dtype.h).
#pragma once

#ifdef LT_CUDA
#include <cuda_runtime_api.h>
#endif

// What Python calls by ctypes: C names that leave the library.
#define LT_EXPORT extern "C" __attribute__((visibility("default")))

namespace llamatelemetry {

// What a launcher returns: nullptr, or a sentence that ends the refusal "<op>: ...".
using Error = const char*;

#ifdef LT_CUDA

#define LT_DISPATCH_KEY CUDA
constexpr bool kOnCuda = true;
using Stream = cudaStream_t;

inline Error last_launch_error() {
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return nullptr;
  if (status == cudaErrorNoKernelImageForDevice) {
    return "the GPU must have an architecture of this build, got another; `llamatelemetry doctor` "
           "lists them, building with LLAMATELEMETRY_CUDA_ARCHS adds one (7.5 is the least)";
  }
  return cudaGetErrorString(status);
}

#else

#define LT_DISPATCH_KEY CPU
constexpr bool kOnCuda = false;
struct Stream {};  // CPU work runs in program order, see parallel.h

#endif

}  // namespace llamatelemetry
