// The CUDA implementations of flash_attn, one launcher each. flash_choice.h says what they serve.
#pragma once

#include "attention/params.h"

namespace llamatelemetry {

// What long chunks of queries of paged_attention run on: launch_flash_fwd_sm90 where it serves the
// GPU and the pages, else the other.
bool flash_fwd_sm90_serves_pages(const FlashAttnParams& params);
Error launch_flash_fwd_paged_sm80(const FlashAttnParams& params, Stream stream);
Error launch_flash_fwd_sm75(const FlashAttnParams& params, Stream stream);
Error launch_flash_fwd_sm80(const FlashAttnParams& params, Stream stream);
Error launch_flash_fwd_sm90(const FlashAttnParams& params, Stream stream);
Error launch_flash_fwd_simt(const FlashAttnParams& params, Stream stream);

}  // namespace llamatelemetry
