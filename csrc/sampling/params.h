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
  void* workspace;  // [batch, sample_workspace_bytes(vocab_size)], each backend its own
  int64_t batch;
  int64_t vocab_size;
  int64_t logits_row_stride;
  DType dtype;
};
Error launch_sample(const SampleParams& params, Stream stream);

// Of one row; each backend says.
int64_t sample_workspace_bytes(int64_t vocab_size);

// Weights are multiples of 2^-40, at most 1: those of this many tokens sum to less than 2^63.
constexpr int64_t kMaxVocabSize = int64_t{1} << 22;

struct TokenBitmaskParams {
  void* logits;            // [batch, vocab_size], rows contiguous and logits_row_stride apart
  const int32_t* bitmask;  // [batch, num_words], rows bitmask_row_stride apart
  int64_t batch;
  int64_t vocab_size;
  int64_t num_words;  // of kTokensPerWord tokens
  int64_t logits_row_stride;
  int64_t bitmask_row_stride;
  DType dtype;
};
Error launch_apply_token_bitmask(const TokenBitmaskParams& params, Stream stream);

constexpr int64_t kTokensPerWord = 32;

}  // namespace llamatelemetry
