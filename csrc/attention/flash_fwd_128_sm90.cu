// The Hopper kernels for heads of at most 128 columns.
#include "attention/flash_sm90_launch.cuh"

namespace llamatelemetry {

Error launch_flash_fwd_sm90_128(const FlashSm90Params& params, Stream stream) {
  using Tile = FlashTile<128, 3, 80, 3, 2>;
  // 80 keys keep the tensor cores busiest, 64 waste less where few keys are seen, and where every
  // row sees the same few, tiles of 128 rows leave none over.
  using LocalTile = FlashTile<128, 3, 64, 4, 2>;
  using ShortFullTile = FlashTile<128, 2, 128, 2, 2>;
  if (has_few_keys(params.call, 1024)) {
    return launch_tiles<ShortFullTile, LocalTile, LocalTile>(params, stream);
  }
  // 80 keys are not whole pages.
  if (params.call.page_size > 0) return launch_tiles<Tile, LocalTile, LocalTile>(params, stream);
  return launch_tiles<Tile, Tile, LocalTile>(params, stream);
}

}  // namespace llamatelemetry
