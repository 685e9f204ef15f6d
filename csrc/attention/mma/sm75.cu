// Attention on compute capability 7.5: the row of tiles.h for each width of head.
#include "attention/launchers.h"
#include "attention/mma/sm75.cuh"

namespace llamatelemetry {

Error launch_sm75(const AttentionParams& p, Stream stream) {
  // Keys and values of the heads that are worked on together, at most: half of a T4's L2.
  constexpr int64_t kGroupBytes = 2 << 20;
  const auto with = [&](auto kernel) {
    return launch_mma_kernel<typename decltype(kernel)::type>(p, kGroupBytes, stream);
  };
  if (p.head_dim <= 64) return with(Type<AttentionSm75<sm75::kHd64>>{});
  if (p.head_dim <= 96) return with(Type<AttentionSm75<sm75::kHd96>>{});
  if (p.head_dim <= 128) return with(Type<AttentionSm75<sm75::kHd128>>{});
  return with(Type<AttentionSm75<sm75::kHd256>>{});
}

}  // namespace llamatelemetry
