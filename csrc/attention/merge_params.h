// What merge_attn_states takes. Apart from params.h, which every attention kernel includes.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"

namespace llamatelemetry {

// Two parts of attention over the same queries, of keys apart from each other, as one.
struct MergeStatesParams {
  const void* out_a;   // [num_tokens, num_heads, head_dim], as out_b and out
  const float* lse_a;  // [num_heads, num_tokens], as lse_b and lse
  const void* out_b;
  const float* lse_b;
  void* out;
  float* lse;
  int64_t num_tokens;
  int64_t num_heads;
  int64_t head_dim;
  DType dtype;
};
Error launch_merge_attn_states(const MergeStatesParams& params, Stream stream);

}  // namespace llamatelemetry
