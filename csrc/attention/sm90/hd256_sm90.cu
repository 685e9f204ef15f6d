// The Hopper kernels for heads of at most 256 columns.
#include "attention/sm90/launch.cuh"

namespace llamatelemetry {

Error launch_sm90_hd256(const Sm90Params& params, Stream stream) {
  using namespace sm90;
  if (params.call.plan.tile == TileClass::kPaged) return launch_paged_tiles<kHd256>(params, stream);
  return launch_tiles<TileSet{.full = kHd256, .causal = kHd256, .local = kHd256}>(params, stream);
}

}  // namespace llamatelemetry
