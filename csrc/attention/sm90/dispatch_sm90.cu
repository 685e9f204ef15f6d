// Attention on Hopper: which mask the window is, and which compiled width serves head_dim. Columns
// past head_dim are zeros in shared memory and are not stored.
#include "attention/launchers.h"
#include "attention/sm90/parts.cuh"

namespace llamatelemetry {

static Error launch_width(const Sm90Params& params, Stream stream) {
  const AttentionParams& p = params.call;
  const bool paged = p.k.page_size > 0;
  if (p.head_dim <= 64) return launch_sm90_hd64(params, stream);
  // The tiles of 96 and 192 columns do not serve pages.
  if (p.head_dim <= 96 && !paged) return launch_sm90_hd96(params, stream);
  if (p.head_dim <= 128) return launch_sm90_hd128(params, stream);
  if (p.head_dim <= 192 && !paged) return launch_sm90_hd192(params, stream);
  return launch_sm90_hd256(params, stream);
}

Error launch_sm90(const AttentionParams& p, Stream stream) {
  Sm90Params params{
      .call = p,
      .mask = MaskKind::kFull,
      .needs_score_rule = needs_score_rule(p),
      .scale_log2 = p.softmax_scale * kLog2E,
      .cap_log2 = p.softcap * kLog2E,
      .cap_rate = p.softcap > 0 ? p.softmax_scale / p.softcap * (2.0f * kLog2E) : 0.0f};
  const bool packed = p.cu_seqlens_q != nullptr;
  const bool paged = p.k.page_size > 0;
  // Wider than any sequence is unlimited; the kernel counts in 32 bits. Of a sequence in pages only
  // the GPU knows how many keys it has.
  const int64_t widest = paged    ? sm90::kMaxCount
                         : packed ? p.total_q + p.total_k
                                  : p.seqlen_q + p.seqlen_k;
  if (p.window_left > widest) params.call.window_left = -1;
  if (p.window_right > widest) params.call.window_right = -1;
  if (params.call.window_right >= 0) params.mask = MaskKind::kCausal;
  // Over pages few calls see every key: they share the kernel of windows.
  const bool is_full = params.mask == MaskKind::kFull;
  if (params.call.window_left >= 0 || (paged && is_full)) params.mask = MaskKind::kLocal;
  const Error error = launch_width(params, stream);
  if (error != nullptr || p.plan.num_splits == 1) return error;
  return launch_add_parts(p, stream);
}

}  // namespace llamatelemetry
