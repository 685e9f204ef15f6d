// flash_attn on Hopper: which pages it serves, which mask the window is, and which compiled width
// serves head_dim. Columns past head_dim are zeros in shared memory and are not stored.
#include "attention/flash_fwd.h"
#include "attention/flash_sm90_params.h"
#include "common/device.h"
#include "tile/dependent_launch.cuh"

namespace llamatelemetry {

static __global__ void clear_kernel(int32_t* counter) {
  let_successors_start();
  wait_for_predecessors();
  *counter = 0;
}
void clear_tile_counter(int32_t* counter, Stream stream) {
  launch_overlapped(clear_kernel, 1, 1, stream, counter);
}

bool flash_fwd_sm90_serves_pages(const FlashAttnParams& p) {
  constexpr int kElementBytes = 2;
  const int64_t page_size = p.page_size;
  const bool one_page = p.seqlen_k == page_size;
  const bool suits = one_page || page_size % kMostBlockKeys == 0 ||
                     (kMostBlockKeys % page_size == 0 && page_size >= kSwizzleRows);
  const bool apart = p.q.token_stride != 0 && p.k.token_stride != 0 && p.v.token_stride != 0;
  const FlashDescriptor call{
      .on_cuda = true,
      .capability = current_device().capability,
      .code_capability = current_device().code_capability,
      .has_sm90_code = true,
      .dtype = p.dtype,
      .aligned = apart && rows_are_aligned(p.q, 1, p.total_q, p.num_heads_q, kElementBytes) &&
                 rows_are_aligned(p.k, p.num_blocks, page_size, p.num_heads_kv, kElementBytes) &&
                 rows_are_aligned(p.v, p.num_blocks, page_size, p.num_heads_kv, kElementBytes)};
  return suits && why_not(FlashImpl::kSm90, call) == nullptr;
}

Error launch_flash_fwd_sm90(const FlashAttnParams& p, Stream stream) {
  FlashSm90Params params{
      .call = p,
      .mask = FlashMask::kFull,
      .shapes_scores = p.softcap > 0 || p.alibi_slopes != nullptr || p.softmax_scale <= 0,
      .scale_log2 = p.softmax_scale * kLog2E,
      .cap_log2 = p.softcap * kLog2E,
      .cap_rate = p.softcap > 0 ? p.softmax_scale / p.softcap * (2.0f * kLog2E) : 0.0f};
  // Wider than any sequence is unlimited; the kernel counts in 32 bits. Of a sequence in pages only
  // the GPU knows how many keys it has.
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t widest = p.page_size > 0 ? kMostCounted
                         : packed        ? p.total_q + p.total_k
                                         : p.seqlen_q + p.seqlen_k;
  if (p.window_left > widest) params.call.window_left = -1;
  if (p.window_right > widest) params.call.window_right = -1;
  if (params.call.window_right >= 0) params.mask = FlashMask::kCausal;
  if (params.call.window_left >= 0) params.mask = FlashMask::kLocal;
  if (p.page_size > 0) {
    // Widths whose blocks of keys are whole pages or parts of one; few calls see every key.
    if (params.mask == FlashMask::kFull) params.mask = FlashMask::kLocal;
    if (p.head_dim <= 64) return launch_flash_fwd_sm90_64(params, stream);
    if (p.head_dim <= 128) return launch_flash_fwd_sm90_128(params, stream);
    return launch_flash_fwd_sm90_256(params, stream);
  }
  if (p.head_dim <= 64) return launch_flash_fwd_sm90_64(params, stream);
  if (p.head_dim <= 96) return launch_flash_fwd_sm90_96(params, stream);
  if (p.head_dim <= 128) return launch_flash_fwd_sm90_128(params, stream);
  if (p.head_dim <= 192) return launch_flash_fwd_sm90_192(params, stream);
  return launch_flash_fwd_sm90_256(params, stream);
}

}  // namespace llamatelemetry
