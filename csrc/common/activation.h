// The activations that kernels of several rooms apply, and those that ops take by name.
// Torch-free.
#pragma once

#include <cstdint>

namespace llamatelemetry {

enum class Activation : int8_t { kNone, kRelu, kRelu2, kSilu, kGelu, kGeluTanh };

// Gated: of gate and up side by side, activation(gate) * up.
struct NamedActivation {
  const char* name;
  Activation activation;
  bool gated;
};
constexpr NamedActivation kNamedActivations[] = {
    {"relu", Activation::kRelu, false},          {"relu2", Activation::kRelu2, false},
    {"silu", Activation::kSilu, false},          {"gelu", Activation::kGelu, false},
    {"gelu_tanh", Activation::kGeluTanh, false}, {"silu_and_mul", Activation::kSilu, true},
    {"gelu_and_mul", Activation::kGelu, true},   {"gelu_tanh_and_mul", Activation::kGeluTanh, true},
};

}  // namespace llamatelemetry
