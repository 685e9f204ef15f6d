// What the launches of sample leave for each other on CUDA, per row. A row is cut into slices, a
// block each; a row of one slice needs no workspace.
#pragma once

#include <cstdint>

namespace llamatelemetry::sampling {

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
// In this order: the row's state, the weight of every bin of scores, largest logit and weight of
// every slice, the number of tokens of every bin, and the ids of the candidates.
static inline constexpr int64_t row_workspace_bytes(int64_t vocab_size) {
  if (num_slices(vocab_size) <= 1) return 0;
  const int64_t bytes = sizeof(SampleRowState) + 12 * kNumBins + 16 * num_slices(vocab_size) +
                        4 * max_candidates(vocab_size);
  return (bytes + 63) / 64 * 64;
}

}  // namespace llamatelemetry::sampling
