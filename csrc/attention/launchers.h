// The CUDA implementations of attention, one launcher each. choice.h says what they serve; they
// refuse nothing that it picks.
#pragma once

#include "attention/params.h"

namespace llamatelemetry {

Error launch_decode(const AttentionParams& params, Stream stream);            // dense and paged
Error launch_decode_fixed(const AttentionParams& params, Stream stream);      // of it, fixed splits
Error launch_decode_wide(const AttentionParams& params, Stream stream);       // of it, plan.is_wide
Error launch_decode_wide_sm90(const AttentionParams& params, Stream stream);  // by_warpgroups
Error launch_decode_e4m3(const AttentionParams& params, Stream stream);       // of it, such caches
Error launch_decode_int8(const AttentionParams& params, Stream stream);
Error launch_decode_sm75(const AttentionParams& params, Stream stream);     // dense and paged
Error launch_decode_cluster(const AttentionParams& params, Stream stream);  // plan.cluster_blocks
Error launch_decode_wide_cluster(const AttentionParams& params, Stream stream);  // and is_wide
Error launch_decode_cluster_e4m3(const AttentionParams& params, Stream stream);
Error launch_decode_cluster_int8(const AttentionParams& params, Stream stream);
Error launch_sm75(const AttentionParams& params, Stream stream);
Error launch_sm80(const AttentionParams& params, Stream stream);
Error launch_sm80_paged(const AttentionParams& params, Stream stream);
Error launch_sm90(const AttentionParams& params, Stream stream);  // dense and paged
Error launch_simt(const AttentionParams& params, Stream stream);
Error launch_simt_paged(const AttentionParams& params, Stream stream);

}  // namespace llamatelemetry
