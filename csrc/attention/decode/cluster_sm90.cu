// Launching cluster.cuh: decode attention of one sequence on Hopper.
#include "attention/decode/cluster_launch.cuh"

namespace llamatelemetry {

Error launch_decode_cluster(const AttentionParams& p, Stream stream) {
  using namespace decode;
  if (p.plan.is_wide) return launch_decode_wide_cluster(p, stream);
  if (p.k.dtype == DType::kFloat8E4M3) return launch_decode_cluster_e4m3(p, stream);
  if (p.k.dtype == DType::kInt8) return launch_decode_cluster_int8(p, stream);
  if (p.head_dim <= 64) return launch_cluster<kConfigs[0]>(p, stream);
  if (p.head_dim <= 96) return launch_cluster<kConfigs[1]>(p, stream);
  if (p.head_dim <= 128) return launch_cluster<kConfigs[2]>(p, stream);
  if (p.head_dim <= 192) return launch_cluster<kConfigs[3]>(p, stream);
  return launch_cluster<kConfigs[4]>(p, stream);
}

}  // namespace llamatelemetry
