#include "gemm/quant_linear_cpu.h"

namespace llamatelemetry {
namespace LT_ISA {

Error launch_quant_linear_groups(const QuantLinearParams& p, Stream) {
  return launch_quant_linear_of<FormatSet::kGroups>(p);
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_quant_linear_groups, QuantLinearParams)
