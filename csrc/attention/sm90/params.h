// What the Hopper kernels of attention take, and one launcher for each width of head. The widths
// are compiled apart so that they build in parallel.
#pragma once

#include "attention/params.h"

namespace llamatelemetry {

enum class MaskKind : int {
  kFull,    // every key
  kCausal,  // keys up to a bound that grows with the query
  kLocal,   // bounded on both sides
};

struct Sm90Params {
  AttentionParams call;
  MaskKind mask;
  bool needs_score_rule;
  float scale_log2;  // softmax_scale * log2(e)
  float cap_log2;    // softcap * log2(e)
  float cap_rate;    // 2 * scale_log2 / softcap: tanh's argument in what exp2 takes; 0: no softcap
};

// Sets the counter that tiles are scheduled with to 0. The next kernel may start before it has.
void clear_tile_counter(int32_t* counter, Stream stream);

// The same, and puts in p.served which sequences have p.plan.min_queries queries.
void list_served(const AttentionParams& p, Stream stream);

// For heads of at most so many columns.
Error launch_sm90_hd64(const Sm90Params& params, Stream stream);
Error launch_sm90_hd96(const Sm90Params& params, Stream stream);
Error launch_sm90_hd128(const Sm90Params& params, Stream stream);
Error launch_sm90_hd192(const Sm90Params& params, Stream stream);
Error launch_sm90_hd256(const Sm90Params& params, Stream stream);

}  // namespace llamatelemetry
