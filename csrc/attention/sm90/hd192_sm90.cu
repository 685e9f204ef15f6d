// The Hopper kernels for heads of at most 192 columns.
#include "attention/sm90/launch.cuh"

namespace llamatelemetry {

Error launch_sm90_hd192(const Sm90Params& params, Stream stream) {
  using namespace sm90;
  return launch_tiles<TileSet{.full = kHd192, .causal = kHd192, .local = kHd192}>(params, stream);
}

}  // namespace llamatelemetry
