// Which way quant_linear goes: a pure function of the call and the machine.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"
#include "format/format.h"

namespace llamatelemetry {

enum class QuantLinearImpl : int8_t {
  kFused,   // one kernel decodes the weights in registers: launch_quant_linear
  kSkinny,  // CUDA: likewise, as the operand of tensor cores: launch_quant_skinny
  kDense,   // CUDA: launch_dense_weights expands them to the dtype of x, torch's matmul reads that
};

struct QuantLinearDescriptor {
  int64_t m;  // rows of x
  int64_t n;  // rows of the weight
  int64_t k;
  ScaleRule scale_rule;
  DType dtype;   // of x
  bool aligned;  // rows of x lie at multiples of 16 bytes
  bool exact;    // weights must not be rounded to the dtype of x
  bool on_cuda;
  int code_capability;  // of the GPU: 80 for code of 8.0
};

// The rows of x that the fused kernel of CUDA serves with one decoding of a weight, in registers.
constexpr int kMaxFusedRows = 8;
// Up to here the skinny kernel, which reads the weights once for 16 rows, is faster than writing
// dense ones, which decoding sub-blocks makes slower, and reading them (benchmarks/notes/gemm.md).
static inline constexpr int max_skinny_rows(ScaleRule rule) {
  return rule == ScaleRule::kBlock ? 32 : 64;
}

// The CPU library has the fused kernel alone: it keeps panels of up to 16 rows in registers,
// multiplies in int8 and never writes the weights out.
constexpr bool kHasDenseWeights = kOnCuda;

static inline constexpr bool serves_skinny(const QuantLinearDescriptor& d) {
  constexpr int64_t kMaxGridY = 65535, kRowsOfBlock = 16;
  return d.on_cuda && d.code_capability >= 80 && d.dtype != DType::kFloat32 && d.aligned &&
         d.m <= kMaxGridY * kRowsOfBlock;
}

static inline constexpr QuantLinearImpl choose_quant_linear(const QuantLinearDescriptor& d) {
  if (!d.on_cuda || d.n == 0 || d.k == 0) return QuantLinearImpl::kFused;
  if (serves_skinny(d) && (d.exact || d.m <= max_skinny_rows(d.scale_rule)))
    return QuantLinearImpl::kSkinny;
  return d.exact || d.m <= kMaxFusedRows ? QuantLinearImpl::kFused : QuantLinearImpl::kDense;
}

}  // namespace llamatelemetry
