// What the launchers of csrc/sampling/ take. Strides in elements.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"

namespace llamatelemetry {

struct SampleParams {
  const void* logits;        // [batch, vocab_size], rows contiguous and logits_row_stride apart
  const float* temperature;  // [batch], as all parameters of a row
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* seed;
  const int64_t* offset;
  int64_t* out;     // [batch]
  void* workspace;  // [batch, sample_workspace_bytes(vocab_size)]
  int64_t batch;
  int64_t vocab_size;
  int64_t logits_row_stride;
  DType dtype;
};
Error launch_sample(const SampleParams& params, Stream stream);

// Weights are multiples of 2^-40: the weights of so many tokens sum to less than 2^63.
constexpr int64_t kMaxVocabSize = int64_t{1} << 22;

#ifdef LT_CUDA

static inline constexpr int64_t sample_workspace_bytes(int64_t) { return 0; }

#else

// The CPU keeps the largest logit of every group and the weight of every segment, then gathers the
// tokens that may be drawn: score, e^(score - best) and id of each.
constexpr int64_t kGroup = 64;
constexpr int64_t kSegment = 64 * kGroup;
constexpr int64_t kPad = 16;  // room for a whole Vec at the end

static inline constexpr int64_t num_groups(int64_t vocab_size) {
  return (vocab_size + kGroup - 1) / kGroup;
}
static inline constexpr int64_t num_segments(int64_t vocab_size) {
  return (vocab_size + kSegment - 1) / kSegment;
}
static inline constexpr int64_t sample_workspace_bytes(int64_t vocab_size) {
  const int64_t words =
      2 * num_segments(vocab_size) + num_groups(vocab_size) + 3 * (vocab_size + kPad);
  return (4 * words + 63) / 64 * 64;
}

#endif

}  // namespace llamatelemetry
