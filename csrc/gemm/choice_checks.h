// What choose_quant_linear must choose, and who applies an activation, checked at every build: on
// an H200, in float16, for weights of 4096 columns, where a line says nothing else.
#pragma once

#include "gemm/choice.h"

namespace llamatelemetry {
namespace choice_checks {

constexpr QuantLinearDescriptor on_h200(int64_t m, int64_t n, CodeFamily codes, ScaleRule rule) {
  return {.m = m,
          .n = n,
          .k = 4096,
          .codes = codes,
          .scale_rule = rule,
          .group_shift = 2,  // groups of 128
          .dtype = DType::kFloat16,
          .aligned = true,
          .exact = false,
          .on_cuda = true,
          .capability = 90,
          .code_capability = 90,
          .has_sm90_code = true,
          .num_sms = 132,
          .max_shared_bytes = 227 * 1024};
}
constexpr QuantLinearDescriptor q4_0(int64_t m) {
  return on_h200(m, 4096, CodeFamily::kU4, ScaleRule::kBlock);
}
constexpr QuantLinearDescriptor q6_k(int64_t m, int64_t n) {
  return on_h200(m, n, CodeFamily::kU6, ScaleRule::kSubBlock16);
}
constexpr QuantLinearDescriptor table(CodeFamily codes) {
  return on_h200(16, 4096, codes, has_code_table(codes) ? ScaleRule::kBlock : ScaleRule::kGroup);
}
constexpr QuantLinearDescriptor s8(int64_t k, int group_shift) {
  QuantLinearDescriptor d = on_h200(1, 4096, CodeFamily::kS8, ScaleRule::kGroup);
  d.k = k;
  d.group_shift = group_shift;
  return d;
}
constexpr QuantLinearDescriptor exact(QuantLinearDescriptor d) {
  d.exact = true;
  return d;
}
constexpr QuantLinearDescriptor on_7_5(QuantLinearDescriptor d) {
  d.capability = d.code_capability = 75;
  return d;
}

static_assert(choose_quant_linear(q4_0(16)) == QuantLinearImpl::kStream);
static_assert(choose_quant_linear(q4_0(17)) == QuantLinearImpl::kWgmma);
static_assert(choose_quant_linear(q4_0(kMaxWgmmaRows + 1)) == QuantLinearImpl::kDense);
static_assert(choose_quant_linear(exact(q4_0(kMaxWgmmaRows + 1))) == QuantLinearImpl::kSkinny);
static_assert(choose_quant_linear(on_7_5(q4_0(kMaxFusedRows))) == QuantLinearImpl::kFused);
static_assert(choose_quant_linear(on_7_5(q4_0(kMaxFusedRows + 1))) == QuantLinearImpl::kDense);
// Chunks of 256 weights: many tiles, and few.
static_assert(choose_quant_linear(q6_k(2, 8192)) == QuantLinearImpl::kStream);
static_assert(choose_quant_linear(q6_k(2, 4096)) == QuantLinearImpl::kSkinny);
static_assert(choose_quant_linear(q6_k(1, 4096)) == QuantLinearImpl::kStream);
// Tables of 16 values that 16 bits hold; NF4's are not such.
static_assert(choose_quant_linear(table(CodeFamily::kIq4)) == QuantLinearImpl::kStream);
static_assert(choose_quant_linear(exact(table(CodeFamily::kIq4))) == QuantLinearImpl::kStream);
static_assert(choose_quant_linear(table(CodeFamily::kFp4)) == QuantLinearImpl::kStream);
static_assert(choose_quant_linear(exact(table(CodeFamily::kFp4))) == QuantLinearImpl::kFused);
static_assert(choose_quant_linear(table(CodeFamily::kNf4)) == QuantLinearImpl::kSkinny);
// Whole chunks of 128, and groups as large.
static_assert(choose_quant_linear(s8(4096, 2)) == QuantLinearImpl::kStream);
static_assert(choose_quant_linear(s8(4096 + 32, 2)) == QuantLinearImpl::kSkinny);
static_assert(choose_quant_linear(s8(4096, 1)) == QuantLinearImpl::kSkinny);

// Gates in whole tiles, and a half that is none.
static_assert(applies_activation(QuantLinearImpl::kStream, 32, true));
static_assert(!applies_activation(QuantLinearImpl::kStream, 48, true));
static_assert(applies_activation(QuantLinearImpl::kStream, 48, false));
static_assert(!applies_activation(QuantLinearImpl::kSkinny, 32, true));
static_assert(!applies_activation(QuantLinearImpl::kWgmma, 32, false));

}  // namespace choice_checks

}  // namespace llamatelemetry
