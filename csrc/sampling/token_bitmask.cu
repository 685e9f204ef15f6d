#include "sampling/token_bitmask.cuh"

#include <algorithm>

namespace llamatelemetry {
namespace {

constexpr int kNumThreads = 256;
constexpr int64_t kWordsPerBlock = kNumThreads / kTokensPerWord;

}  // namespace

Error launch_apply_token_bitmask(const TokenBitmaskParams& p, Stream stream) {
  const int64_t blocks = (p.num_words + kWordsPerBlock - 1) / kWordsPerBlock;
  const dim3 grid(static_cast<unsigned>(std::min(blocks, kMaxBitmaskBlocks)),
                  static_cast<unsigned>(std::min(p.batch, kMaxBitmaskRows)));
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    token_bitmask_kernel<T, kNumThreads><<<grid, kNumThreads, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
