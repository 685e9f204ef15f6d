// Blocks from one cache to another, of the host or of a GPU: checks and Params, compiled once for
// each library.
#include "binding/launch.h"
#include "cache/ops_checks.h"

namespace llamatelemetry {
namespace {

void check_pair(const char* op, const char* k_arg, const Tensor& k, const char* v_arg,
                const Tensor& v) {
  check_stored(op, k_arg, k);
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
  check_pairs(op, block_pairs, on_arg, on);
  check_written_apart(op, "k_to", k_to, "v_to", v_to);
  const DeviceGuard guard(on);
  if (block_pairs.size(0) == 0 || k_from.numel() == 0 || k_to.numel() == 0) return;
  MoveBlocksParams params{
      .planes = {block_plane_of(k_from, k_to), block_plane_of(v_from, v_to)},
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
