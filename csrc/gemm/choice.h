// Which way quant_linear goes: a pure function of the call and the machine.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "format/format.h"

namespace llamatelemetry {

enum class QuantLinearImpl : int8_t {
  kFused,  // one kernel decodes the weights in registers: launch_quant_linear
  kDense,  // launch_dense_weights expands them to the dtype of x, torch's matmul reads that
};

struct QuantLinearDescriptor {
  int64_t m;  // rows of x
  int64_t n;  // rows of the weight
  int64_t k;
  CodeFamily codes;
  bool on_cuda;
  bool exact;  // weights must not be rounded to the dtype of x
};

// The rows of x that the fused kernel of CUDA serves with one decoding of a weight, in registers. A
// ninth row would decode every weight again, and the matmul over dense weights is faster from there
// on, although it writes and reads them once.
constexpr int kMaxFusedRows = 8;

// The CPU library has no launch_dense_weights: its fused kernel keeps panels of up to 16 rows in
// registers, multiplies in int8 and never writes the weights out.
constexpr bool kHasDenseWeights = kOnCuda;

static inline constexpr QuantLinearImpl choose_quant_linear(const QuantLinearDescriptor& d) {
  const bool dense = d.on_cuda && !d.exact && d.m > kMaxFusedRows && d.n > 0 && d.k > 0;
  return dense ? QuantLinearImpl::kDense : QuantLinearImpl::kFused;
}

}  // namespace llamatelemetry
