#include "quant/repack.cuh"

namespace llamatelemetry {
namespace {

template <bool kPack>
Error launch(const RepackParams& p, Stream stream) {
  constexpr int kNumThreads = 128;
  const int64_t num_tiles = (p.n + kTileRows - 1) / kTileRows;
  const int64_t threads = num_tiles * p.blocks_per_row * kTileRows;
  const auto grid = static_cast<unsigned>((threads + kNumThreads - 1) / kNumThreads);
  repack_kernel<kPack, kNumThreads><<<grid, kNumThreads, 0, stream>>>(p);
  return last_launch_error();
}

}  // namespace

Error launch_repack(const RepackParams& params, Stream stream) {
  return launch<true>(params, stream);
}

Error launch_unpack(const RepackParams& params, Stream stream) {
  return launch<false>(params, stream);
}

}  // namespace llamatelemetry
