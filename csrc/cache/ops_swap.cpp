// Blocks from one cache to another, of the host or of a GPU: checks and Params, compiled once for
// each library.
#include "binding/launch.h"
#include "cache/ops_checks.h"

namespace llamatelemetry {
namespace {

SwapPlane swap_plane_of(const Tensor& from, Tensor& to) {
  const auto element = static_cast<int64_t>(to.element_size());
  return {.from = from.const_data_ptr(),
          .from_block_stride_bytes = from.stride(0) * element,
          .from_slot_stride_bytes = from.stride(1) * element,
          .to = to.mutable_data_ptr(),
          .to_block_stride_bytes = to.stride(0) * element,
          .to_slot_stride_bytes = to.stride(1) * element};
}

// The widest copy, up to 16 bytes, that every address allows.
int copy_bytes_of(const SwapPlane (&planes)[2], int64_t row_bytes) {
  int64_t all = row_bytes | 16;
  for (const SwapPlane& plane : planes) {
    all |= reinterpret_cast<int64_t>(plane.from) | reinterpret_cast<int64_t>(plane.to);
    all |= plane.from_block_stride_bytes | plane.from_slot_stride_bytes;
    all |= plane.to_block_stride_bytes | plane.to_slot_stride_bytes;
  }
  return static_cast<int>(all & -all);  // the lowest bit set
}

void check_pair(const char* op, const char* k_arg, const Tensor& k, const char* v_arg,
                const Tensor& v) {
  check_floating(op, k_arg, k);
  check_cache(op, k_arg, k);
  check_cache(op, v_arg, v);
  check_shape(op, v_arg, v, (std::string("the shape of ") + k_arg).c_str(),
              {k.size(0), k.size(1), k.size(2), k.size(3)});
  check_like(op, v_arg, v, k_arg, k);
}

void swap_blocks_(const Tensor& k_from, const Tensor& v_from, Tensor k_to, Tensor v_to,
                  const Tensor& block_pairs) {
  constexpr const char* op = "swap_blocks_";
  check_pair(op, "k_from", k_from, "v_from", v_from);
  check_pair(op, "k_to", k_to, "v_to", v_to);
  check_shape(op, "k_to", k_to, "[num_blocks, page_size, num_heads_kv, head_dim] as k_from is",
              {k_to.size(0), k_from.size(1), k_from.size(2), k_from.size(3)});
  check_dtype(op, "k_to", k_to, k_from.scalar_type());
  const bool crosses_host = k_from.is_cpu() != k_to.is_cpu();
  if (!crosses_host) check_device(op, "k_to", k_to, "k_from", k_from);
  const char* const on_arg = k_from.is_cpu() ? "k_to" : "k_from";
  const Tensor& on = k_from.is_cpu() ? k_to : k_from;
  check_dim(op, "block_pairs", block_pairs, 2, "[num_pairs, 2]");
  check_shape(op, "block_pairs", block_pairs, "[num_pairs, 2]", {block_pairs.size(0), 2});
  check_dtype(op, "block_pairs", block_pairs, ScalarType::Long);
  check_device(op, "block_pairs", block_pairs, on_arg, on);
  check_contiguous(op, "block_pairs", block_pairs);
  const DeviceGuard guard(on);
  if (block_pairs.size(0) == 0 || k_from.numel() == 0 || k_to.numel() == 0) return;
  SwapBlocksParams params{
      .planes = {swap_plane_of(k_from, k_to), swap_plane_of(v_from, v_to)},
      .block_pairs = block_pairs.const_data_ptr<int64_t>(),
      .num_pairs = block_pairs.size(0),
      .num_blocks_from = k_from.size(0),
      .num_blocks_to = k_to.size(0),
      .page_size = k_to.size(1),
      .row_bytes = k_to.size(2) * k_to.size(3) * static_cast<int64_t>(k_to.element_size()),
      .copy_bytes = 0,
      .crosses_host = crosses_host,
  };
  params.copy_bytes = copy_bytes_of(params.planes, params.row_bytes);
  launch(op, launch_swap_blocks, params, on);
}

}  // namespace

LT_IMPL(m) { m.impl("swap_blocks_", TORCH_BOX(&swap_blocks_)); }

}  // namespace llamatelemetry
