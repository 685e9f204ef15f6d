// The Hopper kernels for heads of at most 64 columns.
#include "attention/flash_sm90_launch.cuh"

namespace llamatelemetry {

Error launch_flash_fwd_sm90_64(const FlashSm90Params& params, Stream stream) {
  using Tile = FlashTile<64, 3, 128, 4, 2>;
  // More warpgroups with shorter blocks of keys hide the ends of a tile better.
  using ShortTile = FlashTile<64, 4, 64, 4, 2>;
  if (has_few_keys(params.call, 2048))
    return launch_tiles<ShortTile, ShortTile, Tile>(params, stream);
  return launch_tiles<Tile, Tile, Tile>(params, stream);
}

}  // namespace llamatelemetry
