// Attention on CUDA: hands a call to the implementation that its plan names.
#include "attention/launchers.h"
#include "attention/params.h"

namespace llamatelemetry {

Error launch_dense_attention(const AttentionParams& p, Stream stream) {
  switch (p.plan.impl) {
    case AttentionImpl::kDecode: return launch_decode(p, stream);
    case AttentionImpl::kDecodeSm75: return launch_decode_sm75(p, stream);
    case AttentionImpl::kSm75: return launch_sm75(p, stream);
    case AttentionImpl::kSm80: return launch_sm80(p, stream);
#ifdef LT_SM90
    case AttentionImpl::kSm90: return launch_sm90(p, stream);
#endif
    case AttentionImpl::kSimt: return launch_simt(p, stream);
    default: return "the plan must name an implementation over dense keys, got another";
  }
}

Error launch_paged_attention(const AttentionParams& p, Stream stream) {
  switch (p.plan.impl) {
    case AttentionImpl::kDecode: return launch_decode(p, stream);
    case AttentionImpl::kDecodeSm75: return launch_decode_sm75(p, stream);
    case AttentionImpl::kSm80: return launch_sm80_paged(p, stream);
#ifdef LT_SM90
    case AttentionImpl::kSm90: return launch_sm90(p, stream);
#endif
    case AttentionImpl::kSimt: return launch_simt_paged(p, stream);
    default: return "the plan must name an implementation over pages, got another";
  }
}

}  // namespace llamatelemetry
