// How the kernel of quant_wgmma.cuh divides a call among blocks: a pure function of the call and of
// how many clusters of blocks the machine runs at once.
#pragma once

#include <cstdint>

#include "gemm/choice.h"
#include "gemm/params.h"

namespace llamatelemetry {

// kWgmma: a block has `tokens` rows of x, and row_groups warpgroups side by side, of 64 rows of the
// weight each, for each of its parts, which share k.
struct WgmmaConfig {
  int tokens;
  int row_groups;
  int parts;
};

// Of a few rows of the weight where there are few tiles, of as many as fit where there are many.
enum class WgmmaShape : int8_t { kDeep, kWide };

static inline constexpr WgmmaConfig wgmma_config(int tokens, WgmmaShape shape, CodeFamily codes) {
  if (tokens == 256) return {256, 2, 1};
  // Two chunks of large blocks do not fit beside x for four parts; with planes of high bits
  // registers do not suffice for 256 rows and 128 tokens.
  const bool large = is_byte(codes) || codes == CodeFamily::kU6;
  const bool planes = codes == CodeFamily::kU5 || codes == CodeFamily::kU6;
  if (shape == WgmmaShape::kWide) return {tokens, tokens == 128 && planes ? 3 : 4, 1};
  if (tokens == 128) return {128, 1, 2};
  return large ? WgmmaConfig{tokens, 2, 2} : WgmmaConfig{tokens, 1, 4};
}

// About how long blocks take, in ns of an H200: each kWgmmaStep weights of a row, what a block
// costs beside them, and what a cluster does. They are of a script that was not kept, and follow
// from no file of results. They rank plans, and promise no time (benchmarks/notes/gemm.md).
struct WgmmaCosts {
  int step;
  int block;
  int cluster;
};
constexpr int kWgmmaStep = 128;
static inline constexpr WgmmaCosts wgmma_costs(const WgmmaConfig& config) {
  switch (config.tokens) {
    case 32: return {1080, 2000, 3600};
    case 64: return {1250, 2500, 4000};
    case 128: return config.parts > 1 ? WgmmaCosts{1050, 3500, 4200} : WgmmaCosts{1730, 7000, 5200};
    default: return {1330, 7700, 7000};
  }
}

constexpr int kMaxWgmmaSplits = 8;

struct QuantWgmmaPlan {
  int tokens;
  WgmmaShape shape;
  int splits;  // blocks of a cluster, which share k
};

// Of the least cost. slots[i]: how many clusters of i + 1 blocks run at once. It depends on m only
// through the number of token tiles, so within those a row's sums do not depend on it.
static inline constexpr QuantWgmmaPlan wgmma_plan(int64_t m, int64_t n, int64_t k, CodeFamily codes,
                                                  const int (&slots)[kMaxWgmmaSplits]) {
  QuantWgmmaPlan best{};
  int64_t least = 0;
  for (int tokens = m <= 32   ? 32
                    : m <= 64 ? 64
                              : 128;
       tokens <= (m > 128 ? 256 : 128); tokens *= 2) {
    for (const WgmmaShape shape : {WgmmaShape::kDeep, WgmmaShape::kWide}) {
      const WgmmaConfig config = wgmma_config(tokens, shape, codes);
      const WgmmaCosts costs = wgmma_costs(config);
      const int rows = 64 * config.row_groups;
      const int64_t tiles = (n + rows - 1) / rows * ((m + tokens - 1) / tokens);
      const int64_t steps = (k + kWgmmaStep - 1) / kWgmmaStep;
      for (int splits = 1; splits <= kMaxWgmmaSplits && splits <= steps; ++splits) {
        const int64_t at_once = slots[splits - 1], workers = int64_t{splits} * config.parts;
        if (at_once == 0) continue;
        const int64_t of_block = (steps + workers - 1) / workers * costs.step + costs.block;
        const int64_t cost =
            (tiles + at_once - 1) / at_once * of_block + (splits > 1 ? costs.cluster : 0);
        if (least == 0 || cost < least) best = {tokens, shape, splits}, least = cost;
      }
    }
    if (m <= 64) break;
  }
  return best;
}

// What launch_quant_linear hands kWgmma to, by the rows of x that a block takes.
Error launch_quant_wgmma_32(const QuantLinearParams& params, const QuantWgmmaPlan& plan,
                            Stream stream);
Error launch_quant_wgmma_64(const QuantLinearParams& params, const QuantWgmmaPlan& plan,
                            Stream stream);
Error launch_quant_wgmma_128(const QuantLinearParams& params, const QuantWgmmaPlan& plan,
                             Stream stream);
Error launch_quant_wgmma_256(const QuantLinearParams& params, const QuantWgmmaPlan& plan,
                             Stream stream);
// Those of FormatSet::kGroups.
Error launch_quant_wgmma_groups_32(const QuantLinearParams& params, const QuantWgmmaPlan& plan,
                                   Stream stream);
Error launch_quant_wgmma_groups_64(const QuantLinearParams& params, const QuantWgmmaPlan& plan,
                                   Stream stream);
Error launch_quant_wgmma_groups_128(const QuantLinearParams& params, const QuantWgmmaPlan& plan,
                                    Stream stream);
Error launch_quant_wgmma_groups_256(const QuantLinearParams& params, const QuantWgmmaPlan& plan,
                                    Stream stream);
// How many clusters of 1, 2, .. blocks of theirs the current device runs at once.
using WgmmaClustersAtOnce = int[kMaxWgmmaSplits];
const WgmmaClustersAtOnce& quant_wgmma_clusters_at_once();

}  // namespace llamatelemetry
