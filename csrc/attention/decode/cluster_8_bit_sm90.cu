// Launching cluster.cuh over caches of 8 bits. Apart from cluster_sm90.cu so that they build in
// parallel.
#include "attention/decode/cluster_launch.cuh"

namespace llamatelemetry {

Error launch_decode_cluster_e4m3(const AttentionParams& p, Stream stream) {
  return decode::launch_cluster_8_bit<decode::kE4M3Configs>(p, stream);
}
Error launch_decode_cluster_int8(const AttentionParams& p, Stream stream) {
  return decode::launch_cluster_8_bit<decode::kInt8Configs>(p, stream);
}

}  // namespace llamatelemetry
