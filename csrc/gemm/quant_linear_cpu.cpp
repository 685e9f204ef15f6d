#include "gemm/quant_linear_cpu.h"

namespace llamatelemetry {
namespace LT_ISA {

Error launch_quant_linear(const QuantLinearParams& p, Stream stream) {
  switch (format_set(kFormats[p.format])) {
    case FormatSet::kLowBit: return launch_quant_linear_low_bit(p, stream);
    case FormatSet::kGroups: return launch_quant_linear_groups(p, stream);
    default: return launch_quant_linear_of<FormatSet::kWide>(p);
  }
}

}  // namespace LT_ISA

#if defined(LT_ISA_SCALAR)
int64_t quant_linear_workspace_bytes(const QuantLinearParams& p) {  // the same at every level
  const int64_t per_token =
      p.exact ? p.k * sizeof(float)
              : p.k / scalar::kSubBlock * scalar::activation_block_bytes(p.format);
  return p.m * per_token;
}
#endif

}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_quant_linear, QuantLinearParams)
