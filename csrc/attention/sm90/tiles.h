// The tile configurations of the Hopper kernels, and what the choice must know of them. Torch-free
// and free of CUDA: choice.h reads it too. Measured reasons: benchmarks/notes/attention.md, "On
// Hopper".
#pragma once

#include <cstdint>

namespace llamatelemetry {

struct Sm90TileConfig {
  int head_dim;      // columns that are computed; the heads' may be fewer
  int warpgroups;    // that compute, of 64 query rows each
  int block_keys;    // keys of one product
  int kv_stages;     // blocks in the ring of keys, and in that of values
  int query_stages;  // 2: the next tile's queries have room, and results leave through this one's

  static constexpr int kWarpgroupRows = 64;
  constexpr int block_rows() const { return warpgroups * kWarpgroupRows; }
};

namespace sm90 {

// The longest block of keys where keys lie in pages, which are whole blocks or parts of one; a part
// must fill the rows of 128 bytes that one swizzle permutes.
constexpr int kMaxPagedBlockKeys = 128;
constexpr int kSwizzleRows = 8;

// Windows, places and fetched tiles past the last are added up in 32 bits.
constexpr int64_t kMaxCount = int64_t{1} << 30;
constexpr int kMinBlockRows = 128;  // of any row below

// Bound by exp2, not by the products: long blocks of keys have the fewest ends.
constexpr Sm90TileConfig kHd64{
    .head_dim = 64, .warpgroups = 3, .block_keys = 128, .kv_stages = 4, .query_stages = 2};
// Full and causal, few keys: more warpgroups with shorter blocks hide the ends of a tile better
// (causal 512 1.14 of cuDNN for 1.02; at 4096 the others win).
constexpr Sm90TileConfig kHd64FewKeys{
    .head_dim = 64, .warpgroups = 4, .block_keys = 64, .kv_stages = 4, .query_stages = 2};
// As wide as three warpgroups' registers allow; two stages of it are what shared memory holds.
constexpr Sm90TileConfig kHd96{
    .head_dim = 96, .warpgroups = 3, .block_keys = 96, .kv_stages = 2, .query_stages = 1};
// 80 keys keep the tensor cores busiest: softmax of one warpgroup under the products of two, and
// room for a third stage (causal 1.20 to 1.27 of cuDNN); 96 keys spill.
constexpr Sm90TileConfig kHd128{
    .head_dim = 128, .warpgroups = 3, .block_keys = 80, .kv_stages = 3, .query_stages = 2};
// Windows, few keys under a causal mask, and pages, which 80 keys are no whole number of: 64 keys
// compute less that is masked, and a fourth stage lets warpgroups drift further apart.
constexpr Sm90TileConfig kHd128Local{
    .head_dim = 128, .warpgroups = 3, .block_keys = 64, .kv_stages = 4, .query_stages = 2};
// Few keys that every row sees: 512 and 1024 rows are whole tiles of 128.
constexpr Sm90TileConfig kHd128FewKeys{
    .head_dim = 128, .warpgroups = 2, .block_keys = 128, .kv_stages = 2, .query_stages = 2};
// Two warpgroups from here on: the accumulators of three do not fit the registers.
constexpr Sm90TileConfig kHd192{
    .head_dim = 192, .warpgroups = 2, .block_keys = 96, .kv_stages = 2, .query_stages = 1};
constexpr Sm90TileConfig kHd256{
    .head_dim = 256, .warpgroups = 2, .block_keys = 64, .kv_stages = 2, .query_stages = 1};

// Up to so many keys the row for few keys measures better; -1: there is no such row.
static inline constexpr int64_t max_few_keys(int64_t head_dim) {
  if (head_dim <= 64) return 2048;
  return head_dim > 96 && head_dim <= 128 ? 1024 : -1;
}

// Short chunks over long keys have few tiles: then the keys of a tile are cut into parts, which are
// tiles of their own, of at least so many keys.
constexpr int64_t kMinPartKeys = 1024;
constexpr int kMaxParts = 16;

// How many parts make num_tiles tiles end soonest, each of them with seqlen_k keys. A part costs
// what it takes to begin, to end and to be added: about as long as kMinPartKeys / 8 keys.
static inline constexpr int num_parts(int64_t num_tiles, int64_t seqlen_k, int num_sms) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int parts = 1; parts <= kMaxParts; ++parts) {
    if (parts > 1 && seqlen_k / parts < kMinPartKeys) break;
    const int64_t rounds = (num_tiles * parts + num_sms - 1) / num_sms;
    const int64_t keys = seqlen_k / parts + (parts > 1 ? kMinPartKeys / 8 : 0);
    if (rounds * keys < least) {
      least = rounds * keys;
      best = parts;
    }
  }
  return best;
}

// Whether pages of so many tokens are whole blocks or parts of one, of the rows that serve pages.
static inline constexpr bool serves_page_size(int64_t page_size, bool one_page) {
  return one_page || page_size % kMaxPagedBlockKeys == 0 ||
         (kMaxPagedBlockKeys % page_size == 0 && page_size >= kSwizzleRows);
}

}  // namespace sm90
}  // namespace llamatelemetry
