// flash_attn on CUDA: hands the call to the implementation that ops.cpp chose.
#include "attention/flash_fwd.h"
#include "attention/params.h"

namespace llamatelemetry {

Error launch_flash_attn(const FlashAttnParams& p, Stream stream) {
  switch (p.impl) {
    case FlashImpl::kSm75: return launch_flash_fwd_sm75(p, stream);
    case FlashImpl::kSm80: return launch_flash_fwd_sm80(p, stream);
#ifdef LT_SM90
    case FlashImpl::kSm90: return launch_flash_fwd_sm90(p, stream);
#endif
    case FlashImpl::kSimt: return launch_flash_fwd_simt(p, stream);
    default: return "the implementation must be one of CUDA, got another";
  }
}

}  // namespace llamatelemetry
