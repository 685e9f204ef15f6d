// What runs before the Hopper kernel: its counter of tiles starts at zero, and where it leaves
// sequences to another kernel those that it serves are listed.
#include "attention/sm90/params.h"
#include "tile/dependent_launch.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

static __global__ void clear_kernel(int32_t* counter) {
  let_successors_start();
  wait_for_predecessors();
  *counter = 0;
}
void clear_tile_counter(int32_t* counter, Stream stream) {
  launch_overlapped(clear_kernel, 1, 1, stream, counter);
}

// One warp.
static __global__ void list_kernel(const __grid_constant__ AttentionParams p) {
  let_successors_start();
  wait_for_predecessors();
  const int lane = static_cast<int>(threadIdx.x);
  int count = 0;
  for (int first = 0; first < p.batch; first += kWarpSize) {
    const int index = first + lane;
    const bool is_served = index < p.batch && sequence_span(p, index).num_queries > 0;
    const unsigned others = __ballot_sync(~0u, is_served);
    if (is_served) p.served[1 + count + __popc(others & ((1u << lane) - 1))] = index;
    count += __popc(others);
  }
  if (lane == 0) {
    *p.served = count;
    *p.tile_counter = 0;
  }
}
void list_served(const AttentionParams& p, Stream stream) {
  launch_overlapped(list_kernel, 1, kWarpSize, stream, p);
}

}  // namespace llamatelemetry
