// The Hopper kernels for heads of at most 128 columns.
#include "attention/flash_sm90_launch.cuh"

namespace llamatelemetry {

Error launch_flash_fwd_sm90_128(const FlashSm90Params& params, Stream stream) {
  using Tile = FlashTile<128, 2, 128, 2, 2, true, true>;
  return launch_tiles<Tile, Tile, Tile>(params, stream);
}

}  // namespace llamatelemetry
