// The element types of the package and the step from a run-time DType to a C++ type. Torch-free.
#pragma once

#include <cstdint>

#ifdef LT_CUDA
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace llamatelemetry {

// The first three are what kernels compute in and from; the others are storage, of caches and
// weights, which only an op that says so takes.
enum class DType : int8_t { kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2, kInt8 };
constexpr int kNumDTypes = 6;

// torch's name of dtype.
static inline constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat8E4M3: return "float8_e4m3fn";
    case DType::kFloat8E5M2: return "float8_e5m2";
    case DType::kInt8: return "int8";
  }
  return "unknown";
}

static inline constexpr int dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
    case DType::kInt8: return 1;
  }
  return 0;
}

static inline constexpr bool is_floating(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

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

// Calls body(Type<T>{}) with the T of float32, float16 or bfloat16; returns what body returns.
// check_floating refuses the others to the user; one that comes here all the same is a bug of ours,
// and stops rather than being read as float32. (No throw: it would need inline code of std.)
template <typename Body>
auto dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {  // every DType: the compiler warns of one that is left out
    case DType::kFloat32: return body(Type<float>{});
    case DType::kFloat16: return body(Type<Half>{});
    case DType::kBFloat16: return body(Type<BFloat16>{});
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
    case DType::kInt8: break;
  }
  __builtin_trap();
}

}  // namespace llamatelemetry
