// What the Hopper kernels of flash_attn take, and one launcher for each width of head. The widths
// are compiled apart so that they build in parallel.
#pragma once

#include <cuda.h>

#include "attention/params.h"

namespace llamatelemetry {

enum class FlashMask : int {
  kFull,    // every key
  kCausal,  // keys up to a bound that grows with the query
  kLocal,   // bounded on both sides
};

struct FlashSm90Params {
  FlashAttnParams call;
  FlashMask mask;
  // Whether scores need more than a positive scale: softcap, ALiBi, or a scale that is not
  // positive.
  bool shapes_scores;
  float scale_log2;  // softmax_scale * log2(e)
  float cap_log2;    // softcap * log2(e)
  float cap_rate;    // 2 * scale_log2 / softcap: tanh's argument in what exp2 takes; 0: no softcap
};

// Windows, places and what blocks claim past the last tile are added up in 32 bits.
constexpr int kMostCounted = 1 << 30;

// Blocks of keys have 128 rows or 64 where keys lie in pages; rows of 128 bytes are swizzled by 8.
constexpr int kMostBlockKeys = 128;
constexpr int kSwizzleRows = 8;

// Sets the counter that deals out tiles to 0. The next kernel may start before it has.
void clear_tile_counter(int32_t* counter, Stream stream);

// For heads of at most so many columns.
Error launch_flash_fwd_sm90_64(const FlashSm90Params& params, Stream stream);
Error launch_flash_fwd_sm90_96(const FlashSm90Params& params, Stream stream);
Error launch_flash_fwd_sm90_128(const FlashSm90Params& params, Stream stream);
Error launch_flash_fwd_sm90_192(const FlashSm90Params& params, Stream stream);
Error launch_flash_fwd_sm90_256(const FlashSm90Params& params, Stream stream);

}  // namespace llamatelemetry
