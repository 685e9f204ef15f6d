// The Hopper kernels for heads of at most 64 columns.
#include "attention/sm90/launch.cuh"

namespace llamatelemetry {

Error launch_sm90_hd64(const Sm90Params& params, Stream stream) {
  using namespace sm90;
  constexpr TileSet kAnyKeys{.full = kHd64, .causal = kHd64, .local = kHd64};
  constexpr TileSet kFewKeys{.full = kHd64FewKeys, .causal = kHd64FewKeys, .local = kHd64};
  switch (params.call.plan.tile) {
    case TileClass::kFewKeys: return launch_tiles<kFewKeys>(params, stream);
    case TileClass::kPaged: return launch_paged_tiles<kHd64>(params, stream);
    default: return launch_tiles<kAnyKeys>(params, stream);
  }
}

}  // namespace llamatelemetry
