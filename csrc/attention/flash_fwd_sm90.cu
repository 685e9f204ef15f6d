// flash_attn on Hopper: which mask the window is, and which compiled width serves head_dim. Columns
// past head_dim are zeros in shared memory and are not stored.
#include "attention/flash_fwd.h"
#include "attention/flash_sm90_params.h"

namespace llamatelemetry {

Error launch_flash_fwd_sm90(const FlashAttnParams& p, Stream stream) {
  FlashSm90Params params{
      .call = p,
      .mask = FlashMask::kFull,
      .shapes_scores = p.softcap > 0 || p.alibi_slopes != nullptr || p.softmax_scale <= 0,
      .scale_log2 = p.softmax_scale * kLog2E};
  if (p.window_right >= 0) params.mask = FlashMask::kCausal;
  if (p.window_left >= 0) params.mask = FlashMask::kLocal;
  // Wider than any sequence is unlimited; the kernel counts in 32 bits.
  const int64_t widest = p.seqlen_q + p.seqlen_k;
  if (p.window_left > widest) params.call.window_left = widest;
  if (p.window_right > widest) params.call.window_right = widest;
  if (p.head_dim <= 64) return launch_flash_fwd_sm90_64(params, stream);
  if (p.head_dim <= 96) return launch_flash_fwd_sm90_96(params, stream);
  if (p.head_dim <= 128) return launch_flash_fwd_sm90_128(params, stream);
  if (p.head_dim <= 192) return launch_flash_fwd_sm90_192(params, stream);
  return launch_flash_fwd_sm90_256(params, stream);
}

}  // namespace llamatelemetry
