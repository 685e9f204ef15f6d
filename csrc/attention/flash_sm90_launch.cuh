// The host side of the Hopper kernels of flash_attn: tensor maps, schedule, launch.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <algorithm>
#include <bit>
#include <climits>

#include "attention/flash_fwd_sm90.cuh"
#include "common/device.h"
#include "tile/dependent_launch.cuh"

namespace llamatelemetry {

// The driver's function without linking to the driver: nullptr where there is none.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &found);
    const bool usable = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(usable ? function : nullptr);
  }();
  return encoder;
}

// A box is kColumnBlock columns of num_rows tokens of one head; what lies outside reads as 0.
// Sets the steps to 0 along dimensions that a stride of 0 repeats.
inline Error encode_heads(const Heads& x, DType dtype, int64_t head_dim, int64_t num_tokens,
                          int64_t num_heads, int64_t batch, int num_rows, CUtensorMap* map,
                          int* head_step, int* batch_step) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return "the driver must know cuTensorMapEncodeTiled (CUDA 12)";
  constexpr int64_t kElementBytes = 2;
  *head_step = x.head_stride != 0;
  *batch_step = x.batch_stride != 0;
  const auto size = [](int64_t n, int64_t step) {
    return static_cast<cuuint64_t>(step ? std::max<int64_t>(n, 1) : 1);
  };
  // The stride of a dimension of one element means nothing and may be anything.
  const auto bytes = [](int64_t n, int64_t stride) {
    return static_cast<cuuint64_t>(n > 1 && stride > 0 ? stride * kElementBytes : 16);
  };
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(head_dim), size(num_tokens, 1),
                               size(num_heads, *head_step), size(batch, *batch_step)};
  const cuuint64_t strides[3] = {bytes(num_tokens, x.token_stride), bytes(num_heads, x.head_stride),
                                 bytes(batch, x.batch_stride)};
  const cuuint32_t box[4] = {kColumnBlock, static_cast<cuuint32_t>(num_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult status = encode(
      map,
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "no tensor map fits the strides of q, k, v or out";
}

inline FlashSchedule flash_schedule(const FlashAttnParams& p, int block_m, bool even) {
  // Of keys and values. Where all queries see all keys: as few heads as are at work at once. Else
  // more, so that the longest tiles still come first.
  const int64_t l2_bytes = int64_t{even ? 8 : 32} << 20;
  int64_t keys = p.seqlen_k;  // of a head, at work at once
  if (p.window_left >= 0 && p.window_right >= 0) {
    constexpr int kTilesAtWork = 8;
    keys = std::min(keys, p.window_left + p.window_right + kTilesAtWork * block_m);
  }
  const int64_t head_bytes = std::max<int64_t>(keys * p.head_dim * 2 * 2, 1);
  const int64_t num_heads = p.batch * p.num_heads_q;
  const auto fitting = static_cast<uint64_t>(std::max<int64_t>(l2_bytes / head_bytes, 1));
  const int64_t section =
      static_cast<int64_t>(std::bit_floor(fitting)) * (p.num_heads_q / p.num_heads_kv);
  const int64_t row_blocks = (p.seqlen_q + block_m - 1) / block_m;
  return {.num_tiles = static_cast<int>(std::min<int64_t>(num_heads * row_blocks, INT_MAX)),
          .num_row_blocks = static_cast<int>(row_blocks),
          .num_heads = static_cast<int>(num_heads),
          .section_heads = static_cast<int>(std::min(section, num_heads)),
          .ascends = even};
}

template <typename T, typename Tile, FlashMask kMask>
Error launch_tiles_of(const FlashSm90Params& params, Stream stream) {
  const FlashAttnParams& p = params.call;
  FlashSm90Args args{};
  args.p = params;
  args.schedule = flash_schedule(p, Tile::kBlockM, kMask == FlashMask::kFull);
  const bool packed = p.cu_seqlens_q != nullptr;
  const bool paged = p.page_size > 0;
  if (paged && (kMask == FlashMask::kFull || !Tile::kServesPages)) {
    return "these tiles do not serve keys in pages";
  }
  const bool has_parts = paged && p.seqlen_k != p.page_size && p.page_size < Tile::kBlockN;
  args.keys_at_once = has_parts ? static_cast<int>(p.page_size) : Tile::kBlockN;
  // Sequences in a map: packed ones are one, and pages take their place.
  const int64_t maps = packed ? 1 : p.batch;
  const int64_t maps_k = paged ? p.num_blocks : maps;
  const int64_t tokens_q = packed ? p.total_q : p.seqlen_q;
  const int64_t tokens_k = paged ? p.page_size : packed ? p.total_k : p.seqlen_k;
  if (args.schedule.num_tiles > kMostCounted || tokens_q + tokens_k > kMostCounted) {
    return "the tokens of q and k, and the tiles of q's for all heads, must stay within 2^30";
  }
  // Without keys nothing is copied: any address does.
  const Heads k = p.k.data != nullptr && tokens_k > 0 ? p.k : p.q;
  const Heads v = p.v.data != nullptr && tokens_k > 0 ? p.v : p.q;
  Error error = encode_heads(p.q, p.dtype, p.head_dim, tokens_q, p.num_heads_q, maps, Tile::kBlockM,
                             &args.q_map, &args.q_head_step, &args.q_batch_step);
  if (error == nullptr) {
    error = encode_heads(k, p.dtype, p.head_dim, tokens_k, p.num_heads_kv, maps_k,
                         args.keys_at_once, &args.k_map, &args.k_head_step, &args.k_batch_step);
  }
  if (error == nullptr) {
    error = encode_heads(v, p.dtype, p.head_dim, tokens_k, p.num_heads_kv, maps_k,
                         args.keys_at_once, &args.v_map, &args.v_head_step, &args.v_batch_step);
  }
  if (error == nullptr) {
    const int64_t token_stride = p.num_heads_q * p.head_dim;
    const Heads out{p.out, packed ? 0 : p.seqlen_q * token_stride, token_stride, p.head_dim};
    int unused[2];  // out is contiguous: no stride of 0 that its heads or sequences step along
    error = encode_heads(out, p.dtype, p.head_dim, tokens_q, p.num_heads_q, maps, kWarpRows,
                         &args.out_map, &unused[0], &unused[1]);
  }
  if (error != nullptr) return error;
  const auto kernel = flash_fwd_sm90_kernel<T, Tile, kMask>;
  constexpr int kSharedBytes = sizeof(FlashShared<Tile>);
  static_assert(kSharedBytes <= 227 * 1024);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes) !=
      cudaSuccess) {
    return last_launch_error();
  }
  const int grid = std::min(args.schedule.num_tiles, current_device().num_sms);
  if (args.schedule.num_tiles > grid) clear_tile_counter(p.tile_counter, stream);
  launch_overlapped(kernel, grid, Tile::kThreads, stream, args, kSharedBytes);
  return last_launch_error();
}

// Up to this many keys other tiles do better: benchmarks/NOTES.md.
inline bool has_few_keys(const FlashAttnParams& p, int64_t few) {
  return p.seqlen_k <= few && p.cu_seqlens_q == nullptr;
}

template <typename FullTile, typename CausalTile, typename LocalTile>
Error launch_tiles(const FlashSm90Params& params, Stream stream) {
  const auto launch_dtype = [&](auto type) -> Error {
    using T = typename decltype(type)::type;
    switch (params.mask) {
      case FlashMask::kFull: return launch_tiles_of<T, FullTile, FlashMask::kFull>(params, stream);
      case FlashMask::kCausal:
        return launch_tiles_of<T, CausalTile, FlashMask::kCausal>(params, stream);
      case FlashMask::kLocal:
        return launch_tiles_of<T, LocalTile, FlashMask::kLocal>(params, stream);
    }
    return "the mask must be one of three";
  };
  return params.call.dtype == DType::kFloat16 ? launch_dtype(Type<Half>{})
                                              : launch_dtype(Type<BFloat16>{});
}

}  // namespace llamatelemetry
