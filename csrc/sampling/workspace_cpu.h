// What the launches of sample leave for each other on the CPU, per row: the largest logit of every
// group and the weight of every segment; then the tokens that may be drawn are gathered: score,
// e^(score - best) and id of each.
#pragma once

#include <cstdint>

namespace llamatelemetry {

constexpr int64_t kGroup = 64;
constexpr int64_t kSegment = 64 * kGroup;
constexpr int64_t kPad = 16;  // room for a whole Vec at the end

static inline constexpr int64_t num_groups(int64_t vocab_size) {
  return (vocab_size + kGroup - 1) / kGroup;
}
static inline constexpr int64_t num_segments(int64_t vocab_size) {
  return (vocab_size + kSegment - 1) / kSegment;
}
static inline constexpr int64_t row_workspace_bytes(int64_t vocab_size) {
  const int64_t words =
      2 * num_segments(vocab_size) + num_groups(vocab_size) + 3 * (vocab_size + kPad);
  return (4 * words + 63) / 64 * 64;
}

}  // namespace llamatelemetry
