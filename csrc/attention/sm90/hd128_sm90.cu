// The Hopper kernels for heads of at most 128 columns.
#include "attention/sm90/launch.cuh"

namespace llamatelemetry {

Error launch_sm90_hd128(const Sm90Params& params, Stream stream) {
  using namespace sm90;
  constexpr TileSet kAnyKeys{.full = kHd128, .causal = kHd128, .local = kHd128Local};
  constexpr TileSet kFewKeys{.full = kHd128FewKeys, .causal = kHd128Local, .local = kHd128Local};
  switch (params.call.plan.tile) {
    case TileClass::kFewKeys: return launch_tiles<kFewKeys>(params, stream);
    case TileClass::kPaged: return launch_paged_tiles<kHd128Local>(params, stream);
    default: return launch_tiles<kAnyKeys>(params, stream);
  }
}

}  // namespace llamatelemetry
