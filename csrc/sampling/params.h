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

// A row is cut into slices, a block each. A row of one slice needs no workspace; of any other that
// holds, in this order: its state, the weight and number of tokens of every bin of scores, largest
// logit and weight of every slice, and the ids of the tokens at the edge of what is kept.
constexpr int kSlice = 2048;
constexpr int kNumBins = 912;
constexpr int kMaxCandidates = 8192;

// Bins of tokens that only exact selection among them, the candidates, can keep or drop.
struct SampleEdge {
  int32_t k_first, k_last;  // bins that may hold the k-th token; none: all weight is before them
  int32_t k_left;           // tokens of these bins that are better than the k-th; -1: top-k is off
  int32_t p_first, p_last;  // the same for top-p; what is in bins before p_first is kept
  uint64_t weight_before_k;
  uint64_t weight_before_p;
  int32_t few;  // the candidates are all that may be kept, and no more than a block has threads
};

struct SampleRowState {
  uint32_t num_arrived[2];  // blocks that are done with the second launch and with the third
  uint32_t num_candidates;
  uint32_t finished;  // the second launch has drawn the token
  float best;
  SampleEdge edge;
};

static inline constexpr int64_t num_slices(int64_t vocab_size) {
  return (vocab_size + kSlice - 1) / kSlice;
}
static inline constexpr int64_t max_candidates(int64_t vocab_size) {
  return vocab_size < kMaxCandidates ? vocab_size : kMaxCandidates;
}
static inline constexpr int64_t sample_workspace_bytes(int64_t vocab_size) {
  if (num_slices(vocab_size) <= 1) return 0;
  const int64_t bytes = sizeof(SampleRowState) + 12 * kNumBins + 16 * num_slices(vocab_size) +
                        4 * max_candidates(vocab_size);
  return (bytes + 63) / 64 * 64;
}

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
