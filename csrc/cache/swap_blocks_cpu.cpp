// to[dst] = from[src] for every pair (src, dst), for K and V. Memory bound. One item per slot.
#include <cstring>

#include "cache/params.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

void swap_blocks_items(const SwapBlocksParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t* pair = p.block_pairs + item / p.page_size * 2;
    const int64_t src = pair[0];
    const int64_t dst = pair[1];
    if (src < 0 || src >= p.num_blocks_from || dst < 0 || dst >= p.num_blocks_to) continue;
    const int64_t slot = item % p.page_size;
    for (const SwapPlane& plane : p.planes) {
      const char* from = static_cast<const char*>(plane.from) +
                         src * plane.from_block_stride_bytes + slot * plane.from_slot_stride_bytes;
      char* to = static_cast<char*>(plane.to) + dst * plane.to_block_stride_bytes +
                 slot * plane.to_slot_stride_bytes;
      std::memcpy(to, from, p.row_bytes);
    }
  }
}

}  // namespace

Error launch_swap_blocks(const SwapBlocksParams& params, Stream) {
  const Work work{params.num_pairs * params.page_size,
                  20.0 + 0.2 * static_cast<double>(params.row_bytes)};
  parallel_over<swap_blocks_items>("swap_blocks_", work, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_swap_blocks, SwapBlocksParams)
