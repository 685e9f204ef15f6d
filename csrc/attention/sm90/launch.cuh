// The host side of the Hopper kernels of attention: tensor maps, schedule, launch.
#pragma once

#include <algorithm>
#include <bit>

#include "attention/sm90/kernel.cuh"
#include "common/device.h"
#include "tile/dependent_launch.cuh"
#include "tile/tensor_map.h"

namespace llamatelemetry {

// A box is kColumnBlock columns of num_rows tokens of one head; what lies outside reads as 0.
// Sets the steps to 0 along dimensions that a stride of 0 repeats.
inline Error encode_heads(const Heads& x, DType dtype, int64_t head_dim, int64_t num_tokens,
                          int64_t num_heads, int64_t batch, int num_rows, CUtensorMap* map,
                          int* head_step, int* batch_step) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return kNoTensorMaps;
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

// How many heads' keys and values share L2. Where all queries see all keys: as few heads as are at
// work at once. Else more, so that the longest tiles still come first. Sizes by measurement, as is
// how many tiles of a window are at work at once: benchmarks/notes/attention.md, "On Hopper".
inline int64_t heads_of_group(const AttentionParams& p, int block_rows, bool even) {
  const int64_t l2_bytes = int64_t{even ? 8 : 32} << 20;
  int64_t keys = p.seqlen_k;  // of a head, at work at once
  if (p.window_left >= 0 && p.window_right >= 0) {
    constexpr int kTilesAtWork = 8;
    keys = std::min(keys, p.window_left + p.window_right + kTilesAtWork * block_rows);
  }
  const int64_t head_bytes = std::max<int64_t>(keys * p.head_dim * 2 * 2, 1);
  const auto fitting = static_cast<uint64_t>(std::max<int64_t>(l2_bytes / head_bytes, 1));
  return static_cast<int64_t>(std::bit_floor(fitting)) * (p.num_heads_q / p.num_heads_kv);
}

inline TileSchedule<int> tile_schedule(const AttentionParams& p, int block_rows, bool even) {
  const int64_t num_heads = p.batch * p.num_heads_q;
  const int64_t row_blocks = (p.seqlen_q + block_rows - 1) / block_rows;
  const int64_t group_heads = std::min(heads_of_group(p, block_rows, even), num_heads);
  return {.num_tiles = static_cast<int>(num_heads * row_blocks),
          .num_row_blocks = static_cast<int>(row_blocks),
          .num_heads = static_cast<int>(num_heads),
          .group_heads = static_cast<int>(group_heads),
          .ascends = even};
}

// The tensor maps of q, k, v and out, and what the kernel must know of them. box_keys: tokens of a
// box of keys.
inline Error encode_maps(const AttentionParams& p, int block_rows, int box_keys, Sm90Args* args) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const bool paged = p.k.page_size > 0;
  // Sequences in a map: packed ones are one, and pages take their place.
  const int64_t maps = packed ? 1 : p.batch;
  const int64_t maps_k = paged ? p.num_pages : maps;
  const int64_t tokens_q = packed ? p.total_q : p.seqlen_q;
  const int64_t tokens_k = paged ? p.k.page_size : packed ? p.total_k : p.seqlen_k;
  // Without keys nothing is copied: any address does.
  const auto rows_of = [&](const KeyValueView& x) {
    return x.rows.data != nullptr && tokens_k > 0 ? x.rows : p.q;
  };
  Error error = encode_heads(p.q, p.dtype, p.head_dim, tokens_q, p.num_heads_q, maps, block_rows,
                             &args->q_map, &args->q_head_step, &args->q_batch_step);
  if (error != nullptr) return error;
  error = encode_heads(rows_of(p.k), p.dtype, p.head_dim, tokens_k, p.num_heads_kv, maps_k,
                       box_keys, &args->k_map, &args->k_head_step, &args->k_batch_step);
  if (error != nullptr) return error;
  error = encode_heads(rows_of(p.v), p.dtype, p.head_dim, tokens_k, p.num_heads_kv, maps_k,
                       box_keys, &args->v_map, &args->v_head_step, &args->v_batch_step);
  if (error != nullptr) return error;
  const int64_t token_stride = p.num_heads_q * p.head_dim;
  const Heads out{p.out, packed ? 0 : p.seqlen_q * token_stride, token_stride, p.head_dim};
  int unused[2];  // out is contiguous: no stride of 0 that its heads or sequences step along
  return encode_heads(out, p.dtype, p.head_dim, tokens_q, p.num_heads_q, maps, kWarpRows,
                      &args->out_map, &unused[0], &unused[1]);
}

template <typename T, Sm90TileConfig kConfig, MaskKind kMask>
Error launch_tile(const Sm90Params& params, Stream stream) {
  using Tile = Sm90Tile<kConfig>;
  const AttentionParams& p = params.call;
  Sm90Args args{};
  args.p = params;
  args.num_parts = p.plan.num_splits;
  args.lse = args.num_parts > 1 ? p.partial_stats : p.lse;
  args.schedule = tile_schedule(p, Tile::kBlockM, kMask == MaskKind::kFull);
  const bool paged = p.k.page_size > 0;
  const bool has_parts = paged && p.seqlen_k != p.k.page_size && p.k.page_size < Tile::kBlockN;
  args.keys_at_once = has_parts ? static_cast<int>(p.k.page_size) : Tile::kBlockN;
  const Error error = encode_maps(p, Tile::kBlockM, args.keys_at_once, &args);
  if (error != nullptr) return error;
  const auto kernel = attention_sm90_kernel<T, Tile, kMask>;
  constexpr int kSharedBytes = sizeof(Sm90Storage<Tile>);
  static_assert(kSharedBytes <= 227 * 1024);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes) !=
      cudaSuccess) {
    return last_launch_error();
  }
  const int num_tiles = args.schedule.num_tiles * args.num_parts;
  const int grid = std::min(num_tiles, current_device().num_sms);
  if (p.served != nullptr) {
    list_served(p, stream);
  } else if (num_tiles > grid) {
    clear_tile_counter(p.tile_counter, stream);
  }
  launch_overlapped(kernel, grid, Tile::kThreads, stream, args, kSharedBytes);
  return last_launch_error();
}

// A row of tiles.h for each mask.
struct TileSet {
  Sm90TileConfig full;
  Sm90TileConfig causal;
  Sm90TileConfig local;
};

template <typename Launch>
Error with_dtype(DType dtype, Launch launch) {
  return dtype == DType::kFloat16 ? launch(Type<Half>{}) : launch(Type<BFloat16>{});
}

template <TileSet kSet>
Error launch_tiles(const Sm90Params& params, Stream stream) {
  return with_dtype(params.call.dtype, [&](auto type) -> Error {
    using T = typename decltype(type)::type;
    switch (params.mask) {
      case MaskKind::kFull: return launch_tile<T, kSet.full, MaskKind::kFull>(params, stream);
      case MaskKind::kCausal: return launch_tile<T, kSet.causal, MaskKind::kCausal>(params, stream);
      case MaskKind::kLocal: return launch_tile<T, kSet.local, MaskKind::kLocal>(params, stream);
    }
    return "the mask must be one of three";
  });
}

template <Sm90TileConfig kConfig>
Error launch_paged_tiles(const Sm90Params& params, Stream stream) {
  static_assert(Sm90Tile<kConfig>::kServesPages);
  return with_dtype(params.call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return params.mask == MaskKind::kCausal
               ? launch_tile<T, kConfig, MaskKind::kCausal>(params, stream)
               : launch_tile<T, kConfig, MaskKind::kLocal>(params, stream);
  });
}

}  // namespace llamatelemetry
