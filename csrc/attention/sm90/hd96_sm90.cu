// The Hopper kernels for heads of at most 96 columns.
#include "attention/sm90/launch.cuh"

namespace llamatelemetry {

Error launch_sm90_hd96(const Sm90Params& params, Stream stream) {
  using namespace sm90;
  return launch_tiles<TileSet{.full = kHd96, .causal = kHd96, .local = kHd96}>(params, stream);
}

}  // namespace llamatelemetry
