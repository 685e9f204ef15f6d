// flash_attn on CUDA: hands the call to the implementation that ops.cpp chose.
#include "attention/flash_fwd.h"
#include "attention/params.h"

namespace llamatelemetry {

Error launch_flash_attn(const FlashAttnParams& p, Stream stream) {
  switch (p.impl) {
#ifdef LT_SM90
    case FlashImpl::kSm90: return launch_flash_fwd_sm90(p, stream);
#endif
    case FlashImpl::kSimt: return launch_flash_fwd_simt(p, stream);
    default: return "the implementation must be one of CUDA, got another";
  }
}

}  // namespace llamatelemetry
