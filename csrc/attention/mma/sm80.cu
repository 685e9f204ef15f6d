// Attention over dense keys from compute capability 8.0 on: the row of tiles.h for each width of
// head and class of tiles.
#include "attention/launchers.h"
#include "attention/mma/sm80.cuh"

namespace llamatelemetry {
namespace {

template <typename T>
Error launch(const AttentionParams& p, Stream stream) {
  using namespace sm80;
  const auto with = [&](auto kernel) {
    return launch_mma_kernel<typename decltype(kernel)::type>(p, kGroupBytes, stream);
  };
  const auto with_class = [&](auto large, auto small) {
    return p.plan.tile == TileClass::kLarge ? with(large) : with(small);
  };
  if (p.head_dim <= 64) {
    return with_class(Type<AttentionSm80<T, kHd64>>{}, Type<AttentionSm80<T, kHd64Small>>{});
  }
  if (p.head_dim <= 96) return with(Type<AttentionSm80<T, kHd96>>{});
  if (p.head_dim <= 128) {
    return with_class(Type<AttentionSm80<T, kHd128>>{}, Type<AttentionSm80<T, kHd128Small>>{});
  }
  return with_class(Type<AttentionSm80<T, kHd256>>{}, Type<AttentionSm80<T, kHd256Small>>{});
}

}  // namespace

Error launch_sm80(const AttentionParams& p, Stream stream) {
  return p.dtype == DType::kFloat16 ? launch<Half>(p, stream) : launch<BFloat16>(p, stream);
}

}  // namespace llamatelemetry
