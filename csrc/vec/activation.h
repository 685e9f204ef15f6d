// The activations of a vector, by the operations of torch's CPU kernels in their order.
#pragma once

#include "common/activation.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {

struct Relu {
  LT_INLINE Vec of(Vec x) { return vec_max(vec_set(0.0f), x); }  // NaN stays
};
struct Relu2 {
  LT_INLINE Vec of(Vec x) { return Relu::of(x) * Relu::of(x); }
};
struct Silu {
  LT_INLINE Vec of(Vec x) { return x / (vec_set(1.0f) + vec_exp(vec_set(0.0f) - x)); }
};
struct Gelu {
  LT_INLINE Vec of(Vec x) {
    return x * vec_set(0.5f) * (vec_set(1.0f) + vec_erf(x * vec_set(0.70710678f)));
  }
};
struct GeluTanh {
  LT_INLINE Vec of(Vec x) {
    const Vec inner = vec_set(0.79788456f) * (x + vec_set(0.044715f) * (x * x * x));
    return vec_set(0.5f) * x * (vec_set(1.0f) + vec_tanh(inner));
  }
};

// Where the choice is a value.
LT_INLINE Vec activated(Activation activation, Vec x) {
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

}  // namespace LT_ISA
}  // namespace llamatelemetry
