#include "attention/flash_fwd.h"
#include "attention/paged_attention.cuh"
#include "attention/params.h"
#include "common/device.h"

namespace llamatelemetry {
namespace {

FlashAttnParams as_flash(const PagedAttentionParams& p) {
  const auto pages = [](const PagedCache& cache) {
    return Heads{cache.data, cache.block_stride, cache.slot_stride, cache.head_stride};
  };
  FlashAttnParams flash{};
  flash.q = {p.q, 0, p.q_token_stride, p.q_head_stride};
  flash.k = pages(p.k);
  flash.v = pages(p.v);
  flash.cu_seqlens_q = p.cu_seqlens_q;
  flash.block_table = p.block_table;
  flash.cache_seqlens = p.cache_seqlens;
  flash.out = p.out;
  flash.lse = p.lse;
  flash.tile_counter = p.tile_counter;
  flash.block_table_stride = p.block_table_stride;
  flash.page_size = p.page_size;
  flash.num_blocks = p.num_blocks;
  flash.batch = p.batch;
  flash.seqlen_q = p.max_seqlen_q;
  flash.seqlen_k = p.num_blocks > 0 ? p.max_blocks * p.page_size : 0;
  flash.total_q = p.total_q;
  flash.total_k = flash.seqlen_k;
  flash.num_heads_q = p.num_heads_kv * p.group_size;
  flash.num_heads_kv = p.num_heads_kv;
  flash.head_dim = p.head_dim;
  flash.window_left = p.window_left;
  flash.window_right = p.causal ? 0 : p.window_right;
  flash.softmax_scale = p.softmax_scale;
  flash.softcap = p.softcap;
  flash.dtype = p.dtype;
  flash.impl = FlashImpl::kSm80;
  return flash;
}

}  // namespace

Error launch_paged_attention(const PagedAttentionParams& p, Stream stream) {
  if (p.max_seqlen_q >= kManyQueries && p.dtype != DType::kFloat32) {
    FlashAttnParams flash = as_flash(p);
#ifdef LT_SM90
    if (flash_fwd_sm90_serves_pages(flash)) {
      flash.impl = FlashImpl::kSm90;
      return launch_flash_fwd_sm90(flash, stream);
    }
#endif
    if (current_device().code_capability >= 80) return launch_flash_fwd_paged_sm80(flash, stream);
  }
  constexpr int kNumWarps = 8;
  const int64_t num_heads_q = p.num_heads_kv * p.group_size;
  const dim3 grid(p.total_q, num_heads_q);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    paged_attention_kernel<T, kNumWarps><<<grid, kNumWarps * kWarpSize, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
