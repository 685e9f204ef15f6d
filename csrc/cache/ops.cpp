// Cache writes and slots: checks and Params, compiled once for each library.
#include <utility>

#include "binding/launch.h"
#include "cache/ops_checks.h"

namespace llamatelemetry {
namespace {

// The widest copy, up to 16 bytes, that every address of both planes allows.
int copy_bytes_of(const CachePlane (&planes)[2], int64_t run_bytes) {
  int64_t all = run_bytes | 16;
  for (const CachePlane& plane : planes) {
    all |= reinterpret_cast<int64_t>(plane.source) | reinterpret_cast<int64_t>(plane.cache);
    all |= plane.token_stride_bytes | plane.head_stride_bytes;
    all |= plane.block_stride_bytes | plane.slot_stride_bytes;
  }
  return static_cast<int>(all & -all);  // the lowest bit set
}

void check_rows(const char* op, const char* arg, const Tensor& x, const Tensor& k,
                const Tensor& k_cache) {
  check_shape(op, arg, x, "[num_tokens, num_heads_kv, head_dim] as k and the caches are",
              {k.size(0), k_cache.size(2), k_cache.size(3)});
  check_like(op, arg, x, "k", k);
  check_last_contiguous(op, arg, x);
}

void append_kv_(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache,
                const Tensor& slot_mapping, std::optional<Tensor> k_scales,
                std::optional<Tensor> v_scales) {
  constexpr const char* op = "append_kv_";
  const bool quantises = is_8_bit(k_cache);
  check_caches(op, k_cache, v_cache);
  check_cache_scales(op, k_cache, k_scales, v_scales);
  check_scales_apart(op, k_scales, v_scales);
  check_dim(op, "k", k, 3, "[num_tokens, num_heads_kv, head_dim]");
  check_written_to(op, "k", k, k_cache);
  check_rows(op, "k", k, k, k_cache);
  check_rows(op, "v", v, k, k_cache);
  const int64_t head_dim = k_cache.size(3);
  check(!quantises || head_dim <= kMax8BitHeadDim, op, "head_dim",
        "be at most " + std::to_string(kMax8BitHeadDim) + " beside caches of 8 bits",
        std::to_string(head_dim));
  check_slots(op, slot_mapping, k.size(0), k_cache);
  const DeviceGuard guard(k_cache);
  if (k.numel() == 0 || k_cache.numel() == 0) return;
  AppendKvParams params{
      .planes = {plane_of(k, k_cache), plane_of(v, v_cache)},
      .slot_mapping = slot_mapping.const_data_ptr<int64_t>(),
      .num_tokens = k.size(0),
      .num_blocks = k_cache.size(0),
      .page_size = k_cache.size(1),
      .num_heads = k_cache.size(2),
      .head_bytes = head_dim * static_cast<int64_t>(k_cache.element_size()),
      .copy_bytes = 0,
      .scales = {cache_scales_of(k_scales), cache_scales_of(v_scales)},
      .dtype = *dtype_of(k.scalar_type()),
      .stored = *dtype_of(k_cache.scalar_type()),
  };
  params.copy_bytes = copy_bytes_of(params.planes, params.head_bytes);
  launch(op, quantises ? launch_append_8_bit : launch_append_kv, params, k_cache);
}

void copy_blocks_(Tensor k_cache, Tensor v_cache, const Tensor& block_pairs) {
  constexpr const char* op = "copy_blocks_";
  check_caches(op, k_cache, v_cache);
  check_pairs(op, block_pairs, "k_cache", k_cache);
  const DeviceGuard guard(k_cache);
  if (block_pairs.size(0) == 0 || k_cache.numel() == 0) return;
  MoveBlocksParams params{
      .planes = {block_plane_of(k_cache, k_cache), block_plane_of(v_cache, v_cache)},
      .block_pairs = block_pairs.const_data_ptr<int64_t>(),
      .num_pairs = block_pairs.size(0),
      .num_blocks_from = k_cache.size(0),
      .num_blocks_to = k_cache.size(0),
      .page_size = k_cache.size(1),
      .row_bytes = k_cache.size(2) * k_cache.size(3) * static_cast<int64_t>(k_cache.element_size()),
      .copy_bytes = 0,
      .crosses_host = false,
  };
  params.copy_bytes = copy_bytes_of(params.planes, params.row_bytes);
  launch(op, launch_copy_blocks, params, k_cache);
}

// One number a row, or a token: [size], contiguous, on the device of positions.
void check_column(const char* op, const char* arg, const Tensor& x, const char* meaning,
                  int64_t size, ScalarType dtype, const Tensor& positions) {
  check_shape(op, arg, x, meaning, {size});
  check_dtype(op, arg, x, dtype);
  check_device(op, arg, x, "positions", positions);
  check_contiguous(op, arg, x);
}

BlockTable checked_table(const char* op, const Tensor& block_table, int64_t page_size,
                         const Tensor& positions) {
  check_dim(op, "block_table", block_table, 2, "[batch, max_blocks]");
  check_dtype(op, "block_table", block_table, ScalarType::Int);
  check_device(op, "block_table", block_table, "positions", positions);
  check_last_contiguous(op, "block_table", block_table);
  check(page_size >= 1, op, "page_size", "be at least 1", std::to_string(page_size));
  return {.blocks = block_table.const_data_ptr<int32_t>(),
          .batch = block_table.size(0),
          .max_blocks = block_table.size(1),
          .row_stride = block_table.stride(0),
          .page_size = page_size};
}

Tensor slot_mapping(const Tensor& positions, const Tensor& block_table, const Tensor& cu_seqlens_q,
                    int64_t page_size) {
  constexpr const char* op = "slot_mapping";
  check_dim(op, "positions", positions, 1, "[num_tokens]");
  const int64_t num_tokens = positions.size(0);
  check_column(op, "positions", positions, "[num_tokens]", num_tokens, ScalarType::Long, positions);
  const BlockTable table = checked_table(op, block_table, page_size, positions);
  check_column(op, "cu_seqlens_q", cu_seqlens_q, "[batch + 1]", table.batch + 1, ScalarType::Int,
               positions);
  const DeviceGuard guard(positions);
  Tensor out = allocate(positions, {num_tokens});
  if (num_tokens == 0) return out;
  const SlotMappingParams params{
      .positions = positions.const_data_ptr<int64_t>(),
      .cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>(),
      .out = out.mutable_data_ptr<int64_t>(),
      .num_tokens = num_tokens,
      .table = table,
  };
  launch(op, launch_slot_mapping, params, positions);
  return out;
}

void advance_step_(Tensor input_ids, Tensor positions, Tensor slot_mapping, Tensor cache_seqlens,
                   Tensor offsets, const Tensor& next_ids, const Tensor& active,
                   const Tensor& block_table, int64_t page_size) {
  constexpr const char* op = "advance_step_";
  const BlockTable table = checked_table(op, block_table, page_size, positions);
  const auto column = [&](const char* arg, const Tensor& x, ScalarType dtype) {
    check_column(op, arg, x, "[batch] as block_table", table.batch, dtype, positions);
  };
  column("input_ids", input_ids, ScalarType::Long);
  column("positions", positions, ScalarType::Long);
  column("slot_mapping", slot_mapping, ScalarType::Long);
  column("cache_seqlens", cache_seqlens, ScalarType::Int);
  column("offsets", offsets, ScalarType::Long);
  column("next_ids", next_ids, ScalarType::Long);
  column("active", active, ScalarType::Bool);
  const DeviceGuard guard(positions);
  if (table.batch == 0) return;
  const AdvanceStepParams params{
      .input_ids = input_ids.mutable_data_ptr<int64_t>(),
      .positions = positions.mutable_data_ptr<int64_t>(),
      .slot_mapping = slot_mapping.mutable_data_ptr<int64_t>(),
      .cache_seqlens = cache_seqlens.mutable_data_ptr<int32_t>(),
      .offsets = offsets.mutable_data_ptr<int64_t>(),
      .next_ids = next_ids.const_data_ptr<int64_t>(),
      .active = static_cast<const bool*>(active.const_data_ptr()),
      .table = table,
  };
  launch(op, launch_advance_step, params, positions);
}

}  // namespace

LT_IMPL(m) {
  m.impl("append_kv_", TORCH_BOX(&append_kv_));
  m.impl("copy_blocks_", TORCH_BOX(&copy_blocks_));
  m.impl("slot_mapping", TORCH_BOX(&slot_mapping));
  m.impl("advance_step_", TORCH_BOX(&advance_step_));
}

}  // namespace llamatelemetry
