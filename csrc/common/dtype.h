// The element types of the package and the step from a run-time DType to a C++ type. Torch-free.
#pragma once

#include <cstdint>

#ifdef LT_CUDA
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace llamatelemetry {

enum class DType : int8_t { kFloat32, kFloat16, kBFloat16 };

#ifdef LT_CUDA
using Half = __half;
using BFloat16 = __nv_bfloat16;
#else
// Storage only: vec/vec.h converts to and from float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
#endif

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the T of dtype; returns what body returns.
template <typename Body>
auto dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat16: return body(Type<Half>{});
    case DType::kBFloat16: return body(Type<BFloat16>{});
    case DType::kFloat32: break;
  }
  return body(Type<float>{});
}

}  // namespace llamatelemetry
