// cache[dst] = cache[src] for every pair (src, dst), for K and V. Memory bound. One item per slot.
#include <cstring>

#include "cache/params.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

void copy_blocks_items(const CopyBlocksParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t* pair = p.block_pairs + item / p.page_size * 2;
    const int64_t src = pair[0];
    const int64_t dst = pair[1];
    if (src < 0 || src >= p.num_blocks || dst < 0 || dst >= p.num_blocks || src == dst) continue;
    for (const CachePlane& plane : p.planes) {
      char* slot = static_cast<char*>(plane.cache) + item % p.page_size * plane.slot_stride_bytes;
      std::memcpy(slot + dst * plane.block_stride_bytes, slot + src * plane.block_stride_bytes,
                  p.row_bytes);
    }
  }
}

}  // namespace

Error launch_copy_blocks(const CopyBlocksParams& params, Stream) {
  const Work work{params.num_pairs * params.page_size,
                  20.0 + 0.2 * static_cast<double>(params.row_bytes)};
  parallel_over<copy_blocks_items>("copy_blocks_", work, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_copy_blocks, CopyBlocksParams)
