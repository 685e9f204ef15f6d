// Decode attention on CUDA from compute capability 7.5 on, in float16: all lengths and pages that
// decode.cu and decode_fixed.cu serve.
#include "attention/decode/launch.cuh"

namespace llamatelemetry {

Error launch_decode_sm75(const AttentionParams& p, Stream stream) {
  using namespace decode;
  return p.plan.fixed_splits ? launch_any_width<true, kSm75Configs>(p, stream)
                             : launch_any_width<false, kSm75Configs>(p, stream);
}

}  // namespace llamatelemetry
