#include "quant/repack.cuh"

namespace llamatelemetry {
namespace {

template <typename Params>
Error launch(const Params& p, Stream stream) {
  constexpr int kNumThreads = 128;
  const int64_t num_tiles = (p.sizes.n + kTileRows - 1) / kTileRows;
  const int64_t threads = num_tiles * p.sizes.blocks_per_row * kTileRows;
  const auto grid = static_cast<unsigned>((threads + kNumThreads - 1) / kNumThreads);
  repack_kernel<Params, kNumThreads><<<grid, kNumThreads, 0, stream>>>(p);
  return last_launch_error();
}

}  // namespace

Error launch_repack(const RepackParams& params, Stream stream) { return launch(params, stream); }

Error launch_unpack(const UnpackParams& params, Stream stream) { return launch(params, stream); }

}  // namespace llamatelemetry
