// The activations of a value, by the operations of torch's CUDA kernels in their order.
#pragma once

#include "common/activation.h"

namespace llamatelemetry {

struct Relu {
  static __device__ float of(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays
};
struct Relu2 {
  static __device__ float of(float x) { return Relu::of(x) * Relu::of(x); }
};
struct Silu {
  static __device__ float of(float x) { return x / (1.0f + expf(-x)); }
};
struct Gelu {
  static __device__ float of(float x) { return x * 0.5f * (1.0f + erff(x * 0.70710678f)); }
};
struct GeluTanh {
  static __device__ float of(float x) {
    const float inner = 0.79788456f * (x + 0.044715f * (x * x * x));
    return 0.5f * x * (1.0f + tanhf(inner));
  }
};

// Where the choice is a value: all threads branch alike.
__device__ inline float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone: break;
    case Activation::kRelu: return Relu::of(x);
    case Activation::kRelu2: return Relu2::of(x);
    case Activation::kSilu: return Silu::of(x);
    case Activation::kGelu: return Gelu::of(x);
    case Activation::kGeluTanh: return GeluTanh::of(x);
  }
  return x;
}

}  // namespace llamatelemetry
