// Attention over pages from compute capability 8.0 on. Apart from sm80.cu because looking pages up
// takes registers that its tiles do not have to spare.
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
  if (p.head_dim <= 64) return with(Type<AttentionSm80<T, kHd64Paged>>{});
  if (p.head_dim <= 128) return with(Type<AttentionSm80<T, kHd128Paged>>{});
  return with(Type<AttentionSm80<T, kHd256Paged>>{});
}

}  // namespace

Error launch_sm80_paged(const AttentionParams& p, Stream stream) {
  return p.dtype == DType::kFloat16 ? launch<Half>(p, stream) : launch<BFloat16>(p, stream);
}

}  // namespace llamatelemetry
