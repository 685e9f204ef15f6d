// copy_blocks_ and swap_blocks_: to[dst] = from[src] for every pair (src, dst), for K and V. Memory
// bound. One item per slot.
#include <cstring>

#include "cache/params.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

void move_blocks_items(const MoveBlocksParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t* pair = p.block_pairs + item / p.page_size * 2;
    const int64_t src = pair[0];
    const int64_t dst = pair[1];
    if (src < 0 || src >= p.num_blocks_from || dst < 0 || dst >= p.num_blocks_to) continue;
    const int64_t slot = item % p.page_size;
    for (const BlockPlane& plane : p.planes) {
      const char* from = static_cast<const char*>(plane.from) +
                         src * plane.from_block_stride_bytes + slot * plane.from_slot_stride_bytes;
      char* to = static_cast<char*>(plane.to) + dst * plane.to_block_stride_bytes +
                 slot * plane.to_slot_stride_bytes;
      if (from != to) std::memcpy(to, from, p.row_bytes);
    }
  }
}

Work work_of(const MoveBlocksParams& p) {
  return {p.num_pairs * p.page_size, 20.0 + 0.2 * static_cast<double>(p.row_bytes)};
}

}  // namespace

Error launch_copy_blocks(const MoveBlocksParams& params, Stream) {
  parallel_over<move_blocks_items>("copy_blocks_", work_of(params), params);
  return nullptr;
}

Error launch_swap_blocks(const MoveBlocksParams& params, Stream) {
  parallel_over<move_blocks_items>("swap_blocks_", work_of(params), params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_copy_blocks, MoveBlocksParams)
LT_CPU_LAUNCHER(launch_swap_blocks, MoveBlocksParams)
