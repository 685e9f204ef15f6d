#include "cache/swap_blocks.cuh"

#include <algorithm>

#include "common/int_menu.h"

namespace llamatelemetry {
namespace {

using CopyBytes = IntMenu<1, 2, 4, 8, 16>;
constexpr int kNumThreads = 256;
constexpr int kUnroll = 4;
constexpr int64_t kBlocksOfTheBus = 64;  // 64 x 256 x 4 loads of 16 bytes: 1 MiB under way

// The address by which the GPU reaches host memory; nullptr where it cannot.
void* device_address(const void* host) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, host) != cudaSuccess) {
    cudaGetLastError();  // not the launch's
    return nullptr;
  }
  return attributes.type == cudaMemoryTypeUnregistered ? nullptr : attributes.devicePointer;
}

}  // namespace

Error launch_swap_blocks(const MoveBlocksParams& params, Stream stream) {
  MoveBlocksParams p = params;
  for (BlockPlane& plane : p.planes) {
    plane.from = device_address(plane.from);
    plane.to = device_address(plane.to);
    if (!plane.from || !plane.to) {
      return "caches in host memory must be pinned (pin_memory=True), got memory that the GPU "
             "cannot reach";
    }
  }
  const int64_t num_units = p.num_pairs * 2 * p.page_size * (p.row_bytes / p.copy_bytes);
  const int64_t num_chunks = (num_units - 1) / (kNumThreads * kUnroll) + 1;
  const int64_t most = p.crosses_host ? kBlocksOfTheBus : kMaxBlocks;
  CopyBytes::dispatch(p.copy_bytes, [&](auto bytes) {
    swap_blocks_kernel<bytes(), kNumThreads, kUnroll>
        <<<static_cast<unsigned>(std::min(num_chunks, most)), kNumThreads, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
