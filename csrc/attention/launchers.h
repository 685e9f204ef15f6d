// The CUDA implementations of attention, one launcher each. choice.h says what they serve; they
// refuse nothing that it picks.
#pragma once

#include "attention/params.h"

namespace llamatelemetry {

Error launch_decode(const AttentionParams& params, Stream stream);        // dense and paged
Error launch_decode_fixed(const AttentionParams& params, Stream stream);  // of it, fixed splits
Error launch_sm75(const AttentionParams& params, Stream stream);
Error launch_sm80(const AttentionParams& params, Stream stream);
Error launch_sm80_paged(const AttentionParams& params, Stream stream);
Error launch_sm90(const AttentionParams& params, Stream stream);  // dense and paged
Error launch_simt(const AttentionParams& params, Stream stream);
Error launch_simt_paged(const AttentionParams& params, Stream stream);

}  // namespace llamatelemetry
