// The Hopper kernels for heads of at most 96 columns.
#include "attention/flash_sm90_launch.cuh"

namespace llamatelemetry {

Error launch_flash_fwd_sm90_96(const FlashSm90Params& params, Stream stream) {
  using Tile = FlashTile<96, 3, 96, 2, 1>;
  return launch_tiles<Tile, Tile, Tile>(params, stream);
}

}  // namespace llamatelemetry
