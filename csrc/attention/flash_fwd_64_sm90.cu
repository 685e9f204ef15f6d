// The Hopper kernels for heads of at most 64 columns.
#include "attention/flash_sm90_launch.cuh"

namespace llamatelemetry {

Error launch_flash_fwd_sm90_64(const FlashSm90Params& params, Stream stream) {
  using Tile = FlashTile<64, 3, 128, 4, 2, true, false>;
  // Up to 2048 keys more warpgroups with shorter blocks of keys hide the ends of a tile better,
  // past them longer blocks do better: benchmarks/NOTES.md.
  using ShortTile = FlashTile<64, 4, 64, 4, 2, false, false>;
  constexpr int64_t kFewKeys = 2048;
  const bool is_short = params.call.seqlen_k <= kFewKeys && params.call.cu_seqlens_q == nullptr &&
                        params.mask != FlashMask::kLocal;
  if (!is_short) return launch_tiles<Tile, Tile, Tile>(params, stream);
  return launch_tiles<ShortTile, ShortTile, Tile>(params, stream);
}

}  // namespace llamatelemetry
