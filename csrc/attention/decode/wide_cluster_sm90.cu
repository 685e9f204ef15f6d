// Launching wide_cluster.cuh: decode attention of a few sequences on Hopper, up to 64 rows of a key
// head.
#include "attention/decode/cluster_launch.cuh"
#include "attention/decode/wide_cluster.cuh"

namespace llamatelemetry {
namespace {
using namespace decode;

template <typename Kernel>
Error launch_wide_cluster(const AttentionParams& p, Stream stream) {
  const int heads = static_cast<int>(p.num_heads_kv);
  const int batch = static_cast<int>(p.batch);
  const int blocks = blocks_that_run<Kernel>(p.plan.cluster_blocks, heads * batch);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(heads),
                  static_cast<unsigned>(batch));
  return launch_clusters<Kernel>(blocks, grid, Kernel::kSharedBytes, stream, p);
}
template <Config kConfig, int kStages>
Error launch_any_dtype(const AttentionParams& p, Stream stream) {
  return p.dtype == DType::kFloat16
             ? launch_wide_cluster<WideClusterDecode<Half, kConfig, kStages>>(p, stream)
             : launch_wide_cluster<WideClusterDecode<BFloat16, kConfig, kStages>>(p, stream);
}
}  // namespace

Error launch_decode_wide_cluster(const AttentionParams& p, Stream stream) {
  if (p.head_dim <= 64) return launch_any_dtype<kWideConfigs[0], 4>(p, stream);
  if (p.head_dim <= 96) return launch_any_dtype<kWideConfigs[1], 2>(p, stream);
  return launch_any_dtype<kWideConfigs[2], 2>(p, stream);
}

}  // namespace llamatelemetry
