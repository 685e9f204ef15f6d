#include "gemm/quant_linear.cuh"
#include "gemm/wgmma_plan.h"

namespace llamatelemetry {
namespace {

Error launch_skinny(const QuantLinearParams& p, FormatSet set, Stream stream) {
  const bool is_half = p.dtype == DType::kFloat16;
  switch (set) {
    case FormatSet::kLowBit:
      return is_half ? launch_quant_skinny_low_bit_f16(p, stream)
                     : launch_quant_skinny_low_bit_bf16(p, stream);
    case FormatSet::kGroups:
      return is_half ? launch_quant_skinny_groups_f16(p, stream)
                     : launch_quant_skinny_groups_bf16(p, stream);
    default:
      return is_half ? launch_quant_skinny_f16(p, stream) : launch_quant_skinny_bf16(p, stream);
  }
}

Error launch_stream(const QuantLinearParams& p, Stream stream) {
  const bool is_half = p.dtype == DType::kFloat16;
  switch (stream_set(kFormats[p.format].codes)) {
    case StreamSet::kWide:
      return is_half ? launch_quant_stream_wide_f16(p, stream)
                     : launch_quant_stream_wide_bf16(p, stream);
    case StreamSet::kTables:
      return is_half ? launch_quant_stream_tables_f16(p, stream)
                     : launch_quant_stream_tables_bf16(p, stream);
    default:
      return is_half ? launch_quant_stream_f16(p, stream) : launch_quant_stream_bf16(p, stream);
  }
}

#ifdef LT_SM90
Error launch_wgmma(const QuantLinearParams& p, FormatSet set, Stream stream) {
  const QuantWgmmaPlan plan =
      wgmma_plan(p.m, p.n, p.k, kFormats[p.format].codes, quant_wgmma_clusters_at_once());
  const bool groups = set == FormatSet::kGroups;
  switch (plan.tokens) {
    case 32:
      return groups ? launch_quant_wgmma_groups_32(p, plan, stream)
                    : launch_quant_wgmma_32(p, plan, stream);
    case 64:
      return groups ? launch_quant_wgmma_groups_64(p, plan, stream)
                    : launch_quant_wgmma_64(p, plan, stream);
    case 128:
      return groups ? launch_quant_wgmma_groups_128(p, plan, stream)
                    : launch_quant_wgmma_128(p, plan, stream);
    case 256:
      return groups ? launch_quant_wgmma_groups_256(p, plan, stream)
                    : launch_quant_wgmma_256(p, plan, stream);
    default: return "no block of it fits on the device";
  }
}
#endif

}  // namespace

int64_t quant_linear_workspace_bytes(const QuantLinearParams&) { return 0; }

Error launch_quant_linear(const QuantLinearParams& p, Stream stream) {
  const FormatSet set = format_set(kFormats[p.format]);
  if (p.impl == QuantLinearImpl::kStream) return launch_stream(p, stream);
  if (p.impl == QuantLinearImpl::kSkinny) return launch_skinny(p, set, stream);
#ifdef LT_SM90
  if (p.impl == QuantLinearImpl::kWgmma) return launch_wgmma(p, set, stream);
#endif
  switch (set) {
    case FormatSet::kLowBit: return launch_quant_linear_low_bit(p, stream);
    case FormatSet::kGroups: return launch_quant_linear_groups(p, stream);
    default: return launch_quant_linear_of<FormatSet::kWide>(p, stream);
  }
}

}  // namespace llamatelemetry
