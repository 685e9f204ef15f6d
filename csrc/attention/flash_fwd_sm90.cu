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
  // Wider than any sequence is unlimited; the kernel counts in 32 bits.
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t widest = packed ? p.total_q + p.total_k : p.seqlen_q + p.seqlen_k;
  if (p.window_left > widest) params.call.window_left = -1;
  if (p.window_right > widest) params.call.window_right = -1;
  if (params.call.window_right >= 0) params.mask = FlashMask::kCausal;
  if (params.call.window_left >= 0) params.mask = FlashMask::kLocal;
  if (p.head_dim <= 64) return launch_flash_fwd_sm90_64(params, stream);
  if (p.head_dim <= 96) return launch_flash_fwd_sm90_96(params, stream);
  if (p.head_dim <= 128) return launch_flash_fwd_sm90_128(params, stream);
  if (p.head_dim <= 192) return launch_flash_fwd_sm90_192(params, stream);
  return launch_flash_fwd_sm90_256(params, stream);
}

}  // namespace llamatelemetry
