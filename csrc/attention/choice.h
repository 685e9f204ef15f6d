// Which kernel serves an attention call: a pure function of what the call and the machine are.
// ops_*.cpp ask it before they allocate, launchers run what it picked and refuse nothing of it, and
// `doctor` prints it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "attention/decode/config.h"
#include "attention/mma/tiles.h"
#include "attention/sm90/tiles.h"
#include "common/cache_dtype.h"
#include "common/dtype.h"

namespace llamatelemetry {

constexpr int kMaxHeadDim = 256;
constexpr int kHeadDimMultiple = 8;

// At this many queries a sequence, the tensor-core prefill kernels take over from those that
// split the keys (decode) or serve a query row a block (simt).
constexpr int64_t kMinPrefillQueries = 16;
// CPU: with at most this many queries, the keys are split across threads (split-KV).
constexpr int64_t kMaxSplitQueries = 16;
// CPU: at most this many rows of a key head, decode: vector lanes along head_dim; more, prefill:
// lanes along rows.
constexpr int kMaxDecodeRows = 16;
constexpr int64_t kMinSplitKeys = 64;  // of a part: a block of keys of cpu/decode.h
// What split_size is a multiple of: tiles of keys of every kernel that splits.
constexpr int64_t kSplitMultiple = 64;
static_assert(kSplitMultiple % decode::kTileKeys == 0 && kSplitMultiple % kMinSplitKeys == 0);
constexpr int64_t kMaxSplitKeys = int64_t{1} << 30;
// Rows that decode beside chunks get a launch of their own where so many keys may be theirs: fewer
// do not win back what it costs, and a single one mostly runs beside the chunk. By measurement:
// benchmarks/notes/attention.md.
constexpr int64_t kMinKeysBesideChunks = 4096;
constexpr int64_t kMinKeysOfOneBesideChunks = 16384;

enum class AttentionImpl : int { kNone, kCpu, kDecode, kDecodeSm75, kSm75, kSm80, kSm90, kSimt };

// What `backend` may say, and the only place that spells the names.
struct NamedImpl {
  AttentionImpl impl;
  const char* name;
};
constexpr NamedImpl kNamedImpls[] = {{AttentionImpl::kCpu, "cpu"},
                                     {AttentionImpl::kDecode, "decode"},
                                     {AttentionImpl::kDecodeSm75, "decode_sm75"},
                                     {AttentionImpl::kSm75, "sm75"},
                                     {AttentionImpl::kSm80, "sm80"},
                                     {AttentionImpl::kSm90, "sm90"},
                                     {AttentionImpl::kSimt, "simt"}};

static inline constexpr bool decodes(AttentionImpl impl) {
  return impl == AttentionImpl::kDecode || impl == AttentionImpl::kDecodeSm75;
}

// Which of an implementation's kernels and tile configurations: mma/tiles.h, sm90/tiles.h.
enum class TileClass : int {
  kRow,      // no tile: one query row (simt), or the few of a key head (cpu, decode)
  kLarge,    // many rows
  kFewKeys,  // sm90: few keys
  kLowSmem,  // sm80: little shared memory
  kPaged,    // sm80, sm90: keys in pages
};

struct AttentionDescriptor {
  // The machine.
  bool on_cuda;
  bool has_sm90_code;    // whether this build holds code for 9.0a
  int capability;        // of the GPU: 90 for 9.0
  int code_capability;   // of the code that runs on it: 80 where it was built for 8.0 and its PTX
  int max_shared_bytes;  // of a block
  int num_sms;
  int num_threads;  // of the CPU
  // The call.
  DType dtype;
  DType kv_dtype;     // of what keys and values are stored in
  bool is_packed;     // sequences of any length
  bool aligned;       // rows of q, k and v lie apart, each at a multiple of 16 bytes
  bool far_apart;     // keys of a sequence, or pages, begin 2^36 bytes or more from each other
  int64_t page_size;  // 0: keys are dense
  int64_t head_dim;
  int64_t batch;
  int64_t num_heads_q;
  int64_t num_heads_kv;
  int64_t seqlen_q;  // as in AttentionParams
  int64_t seqlen_k;
  int64_t total_q;
  int64_t total_k;
  bool has_score_terms;  // softcap or ALiBi
  // What the caller asks of kernels that split, 0: nothing. A row's bits then depend on nothing but
  // its own sequence. On a GPU that is calls of fewer than kMinPrefillQueries: others leave keys
  // whole then, and sequences of fewer to a launch that cuts theirs (min_queries_of).
  int num_splits;
  int split_keys;
  // Sequences of fewer or more queries are another kernel's of the same call. 0: none are.
  int64_t min_queries;
  int64_t max_queries;
};

struct AttentionPlan {
  AttentionImpl impl;
  TileClass tile;
  int num_splits;       // parts that the keys of a sequence are cut into, at most
  int split_keys;       // where they are cut: at multiples of it; 0: into equal parts
  bool fixed_splits;    // whether the caller said so; else decode shares the batch's keys evenly
  int num_blocks;       // decode: of the grid; else 0
  bool is_wide;         // decode: row tiles of kWideRowTile
  bool by_warpgroups;   // and multiplied by wgmma, decode/warpgroup.cuh
  int num_sms;          // decode: of the GPU
  int cluster_blocks;   // decode of one sequence, cluster.cuh: of a cluster; 0: the grid has none
  int64_t min_queries;  // as in AttentionDescriptor
  int64_t max_queries;
};

static inline constexpr const char* impl_name(AttentionImpl impl) {
  for (const NamedImpl& named : kNamedImpls) {
    if (named.impl == impl) return named.name;
  }
  return "none";
}

static inline constexpr const char* tile_class_name(TileClass tile) {
  switch (tile) {
    case TileClass::kRow: return "rows";
    case TileClass::kLarge: return "large tiles";
    case TileClass::kFewKeys: return "tiles for few keys";
    case TileClass::kLowSmem: return "tiles for little shared memory";
    case TileClass::kPaged: return "tiles for pages";
  }
  return "unknown";
}

// ---- What an implementation can serve ----

static inline constexpr bool has_fixed_splits(const AttentionDescriptor& d) {
  return d.num_splits > 0 || d.split_keys > 0;
}

// Blocks of a grid that has one for each tile of block_rows queries.
static inline constexpr bool grid_fits(const AttentionDescriptor& d, int block_rows,
                                       int64_t max_blocks) {
  const int64_t heads = d.batch * d.num_heads_q;
  return heads == 0 || (d.seqlen_q + block_rows - 1) / block_rows <= max_blocks / heads;
}

static inline constexpr TileClass sm80_tile_class(const AttentionDescriptor& d) {
  if (d.page_size > 0) return TileClass::kPaged;
  return sm80::has_room(d.head_dim, d.max_shared_bytes) ? TileClass::kLarge : TileClass::kLowSmem;
}

static inline constexpr const char* why_not_sm90(const AttentionDescriptor& d) {
  if (d.capability / 10 != 9) return "it needs a GPU of compute capability 9.x";
  if (!d.has_sm90_code) return "this build holds no code for 9.0";
  if (!is_16_bit(d.dtype)) return "it serves float16 and bfloat16";
  if (!d.aligned) return "rows of q, k and v must lie apart, at multiples of 16 bytes";
  if (d.page_size > 0 && !sm90::serves_page_size(d.page_size, d.seqlen_k == d.page_size)) {
    return "pages must have 8, 16, 32 or 64 tokens, a multiple of 128, or all of a sequence's";
  }
  const int64_t tokens_q = d.is_packed ? d.total_q : d.seqlen_q;
  const int64_t tokens_k = d.page_size > d.seqlen_k          ? d.page_size
                           : d.is_packed && d.page_size == 0 ? d.total_k
                                                             : d.seqlen_k;
  if (tokens_q + tokens_k > sm90::kMaxCount) return "it counts up to 2^30 tokens of q and k";
  if (!grid_fits(d, sm90::kMinBlockRows, sm90::kMaxCount)) {
    return "it counts up to 2^30 tiles of queries";
  }
  return nullptr;
}

static inline constexpr const decode::Config& decode_config(AttentionImpl impl, int64_t head_dim,
                                                            DType stored, bool is_wide) {
  return decode::config_of(head_dim,
                           stored == DType::kFloat8E4M3 ? decode::Stored::kE4M3
                           : stored == DType::kInt8     ? decode::Stored::kInt8
                                                        : decode::Stored::kAsQueries,
                           is_wide, impl == AttentionImpl::kDecodeSm75);
}

// Rows of a key head: its query heads, of all queries of a sequence.
static inline constexpr int64_t rows_of_key_head(const AttentionDescriptor& d) {
  return d.num_heads_kv > 0 ? d.seqlen_q * (d.num_heads_q / d.num_heads_kv) : 0;
}
// Whether kernels of Hopper alone, wgmma and clusters, run here.
static inline constexpr bool runs_sm90_code(const AttentionDescriptor& d) {
  return d.capability / 10 == 9 && d.has_sm90_code;
}
// Whether wgmma multiplies wide row tiles. Calls with softcap or ALiBi stay with mma.sync, where
// softcap is computed by tanhf. With wgmma a tanh from an approximate exponential was tried: an lse
// was off by more than the tests allow.
static inline constexpr bool multiplies_by_warpgroups(const AttentionDescriptor& d) {
  return runs_sm90_code(d) && !d.has_score_terms;
}
// Blocks of a cluster for each of so many clusters, a power of two: as many as multiprocessors
// hold at once. 0 where clusters would leave most of those idle.
static inline constexpr int cluster_blocks_for(const AttentionDescriptor& d, int64_t clusters) {
  int blocks = decode::kMaxClusterBlocks;
  while (blocks > 1 && clusters * blocks > d.num_sms) blocks /= 2;
  constexpr int64_t kLeastInUse = 40;  // of 100 multiprocessors
  return blocks > 1 && 100 * clusters * blocks >= kLeastInUse * d.num_sms ? blocks : 0;
}
static inline constexpr int64_t row_tiles_of(const AttentionDescriptor& d) {
  return (rows_of_key_head(d) + decode::kRowTile - 1) / decode::kRowTile;
}

// Rows that wide tiles take: more than a warp's, of keys in q's dtype.
static inline constexpr bool may_be_wide(const AttentionDescriptor& d) {
  return rows_of_key_head(d) > decode::kRowTile && d.kv_dtype == d.dtype && !has_fixed_splits(d) &&
         d.head_dim <= decode::kMaxWideHeadDim;
}
// As cluster_blocks_of, for up to kWideRowTile rows of a key head: blocks for each of a sequence's
// key heads. Each sequence gets as many, whatever its length. Were one alone long, it would be read
// by a share of the GPU; but row tiles of kRowTile, each of which reads the keys once more, are no
// faster then where there are as many of them as sequences.
static inline constexpr int wide_cluster_blocks_of(const AttentionDescriptor& d) {
  const bool is_packed_dense = d.is_packed && d.page_size == 0;
  const bool serves = may_be_wide(d) && rows_of_key_head(d) <= decode::kWideRowTile &&
                      multiplies_by_warpgroups(d) && !is_packed_dense;
  if (!serves || d.batch > row_tiles_of(d)) return 0;
  return cluster_blocks_for(d, d.batch * d.num_heads_kv);
}
// Whether kDecode takes wide row tiles. They read keys once for more rows, but their parts take
// long to combine: clusters must have it, or there must be a key head for two of five
// multiprocessors, where wgmma multiplies them, or for every other. By measurement:
// benchmarks/notes/attention.md.
static inline constexpr bool decodes_wide(const AttentionDescriptor& d) {
  const int64_t key_heads = d.batch * d.num_heads_kv;
  const bool has_many = multiplies_by_warpgroups(d) ? 5 * key_heads >= 2 * int64_t{d.num_sms}
                                                    : 2 * key_heads >= d.num_sms;
  return may_be_wide(d) && (has_many || wide_cluster_blocks_of(d) > 0);
}

// Blocks of a cluster for each row tile of a key head of one sequence, a power of two. 0 where
// there may be many keys, which blocks of all multiprocessors read faster, or clusters would leave
// most of those idle: how many keys there are is known on the GPU alone, after the launch.
static inline constexpr int cluster_blocks_of(const AttentionDescriptor& d) {
  const bool is_packed_dense = d.is_packed && d.page_size == 0;
  if (!runs_sm90_code(d) || d.batch != 1 || has_fixed_splits(d) || d.has_score_terms ||
      is_packed_dense || d.seqlen_k > decode::kMaxClusterKeys) {
    return 0;
  }
  return cluster_blocks_for(d, d.num_heads_kv * row_tiles_of(d));
}

static inline constexpr const char* why_not_decode(AttentionImpl impl,
                                                   const AttentionDescriptor& d) {
  const bool is_sm75 = impl == AttentionImpl::kDecodeSm75;
  if (!is_sm75 && d.code_capability < 80) {
    return "it needs a GPU of compute capability 8.0 or later and code for it";
  }
  if (is_sm75 && d.dtype != DType::kFloat16) return "it serves float16";
  if (d.dtype == DType::kFloat32) return "it serves float16 and bfloat16";
  if (!d.aligned) return "rows of q, k and v must lie apart, at multiples of 16 bytes";
  if (is_8_bit_cache(d.kv_dtype)) {
    if (d.head_dim % 16 != 0) return "over 8 bits head_dim must be a multiple of 16";
  }
  const bool is_wide = !is_sm75 && decodes_wide(d);
  if (decode_config(impl, d.head_dim, d.kv_dtype, is_wide).shared_bytes() > d.max_shared_bytes) {
    return "its blocks need more shared memory than this GPU gives one";
  }
  if (d.far_apart) return "it reaches caches of up to 64 GB";
  const int64_t segments = d.batch * d.num_heads_kv * row_tiles_of(d);
  const int64_t tiles = d.seqlen_k / decode::kTileKeys + 2;
  if (d.seqlen_k > INT32_MAX - decode::kTileKeys) return "it counts up to 2^31 - 65 keys";
  if (segments > 0 && tiles > INT32_MAX / segments) {
    return "it counts up to 2^31 - 1 tiles of keys";
  }
  return nullptr;
}

static inline constexpr const char* why_not_mma(AttentionImpl impl, const AttentionDescriptor& d) {
  const bool is_sm80 = impl == AttentionImpl::kSm80;
  if (is_sm80 && d.code_capability < 80) {
    return "it needs a GPU of compute capability 8.0 and code for it";
  }
  if (is_sm80 && !is_16_bit(d.dtype)) return "it serves float16 and bfloat16";
  if (!is_sm80 && d.dtype != DType::kFloat16) return "it serves float16";
  if (!is_sm80 && d.page_size > 0) return "it serves dense keys, not pages";
  const MmaTileConfig& tile =
      !is_sm80          ? sm75::tile_of(d.head_dim)
      : d.page_size > 0 ? sm80::paged_tile_of(d.head_dim)
                        : sm80::tile_of(d.head_dim, sm80_tile_class(d) == TileClass::kLarge);
  return grid_fits(d, tile.block_rows(), INT32_MAX) ? nullptr
                                                    : "its grid has at most 2^31 - 1 tiles";
}

static inline constexpr const char* why_not_simt(const AttentionDescriptor& d) {
  // Dense 16-bit calls have tensor cores; over pages it serves the few queries of decoding too.
  if (d.page_size == 0 && d.dtype != DType::kFloat32) return "it serves float32";
  constexpr int64_t kMaxGridY = 65535;
  if (d.num_heads_q > kMaxGridY) return "its grid has at most 65535 query heads";
  return d.total_q <= INT32_MAX ? nullptr : "its grid has at most 2^31 - 1 queries";
}

// Why impl cannot serve the call, or nullptr where it can.
static inline constexpr const char* why_not(AttentionImpl impl, const AttentionDescriptor& d) {
  if (impl == AttentionImpl::kCpu && d.on_cuda) return "the tensors are on a GPU";
  if (impl != AttentionImpl::kCpu && !d.on_cuda) return "the tensors are on the CPU";
  const bool takes_8_bit =
      impl == AttentionImpl::kCpu || impl == AttentionImpl::kDecode || impl == AttentionImpl::kSimt;
  const bool converts = (takes_8_bit && is_8_bit_cache(d.kv_dtype)) ||
                        is_16_bit_cache(d.on_cuda, d.dtype, d.kv_dtype);
  if (d.kv_dtype != d.dtype && !converts) {
    return "keys and values must be stored in q's dtype";
  }
  switch (impl) {
    case AttentionImpl::kCpu: return nullptr;
    case AttentionImpl::kDecode:
    case AttentionImpl::kDecodeSm75: return why_not_decode(impl, d);
    case AttentionImpl::kSm90: return why_not_sm90(d);
    case AttentionImpl::kSm80:
    case AttentionImpl::kSm75: return why_not_mma(impl, d);
    case AttentionImpl::kSimt: return why_not_simt(d);
    case AttentionImpl::kNone: break;
  }
  return "no such implementation";
}

// ---- What is chosen ----

// The first in this order that can serve the call and is worth it; kNone where none can.
static inline constexpr AttentionImpl best_impl(const AttentionDescriptor& d) {
  // Rows over one read of the keys.
  const int64_t rows = rows_of_key_head(d);
  const bool few_rows =
      d.page_size > 0 && !has_fixed_splits(d) && why_not(AttentionImpl::kDecode, d) == nullptr &&
      (rows <= decode::kRowTile || (decodes_wide(d) && rows <= decode::kWideRowTile));
  const bool few_queries = d.seqlen_q < kMinPrefillQueries || few_rows;
  for (const AttentionImpl impl :
       {AttentionImpl::kCpu, AttentionImpl::kDecode, AttentionImpl::kSm90, AttentionImpl::kSm80,
        AttentionImpl::kDecodeSm75, AttentionImpl::kSm75, AttentionImpl::kSimt}) {
    // Over 8 bits nothing else with tensor cores serves chunks.
    if (impl == AttentionImpl::kDecode && !few_queries && d.kv_dtype == d.dtype) continue;
    // Where "decode" cannot run for want of code. Over pages for chunks too: nothing else there has
    // tensor cores, and simt reads keys once for each query head. No T4 has timed the two.
    const bool suits_sm75 = d.code_capability < 80 && (d.page_size > 0 || few_queries);
    if (impl == AttentionImpl::kDecodeSm75 && !suits_sm75) continue;
    const bool is_prefill = impl == AttentionImpl::kSm90 || impl == AttentionImpl::kSm80;
    if (is_prefill && few_queries && d.page_size > 0) continue;
    if (why_not(impl, d) == nullptr) return impl;
  }
  return AttentionImpl::kNone;
}

// Whose launch of its own serves sequences of few queries of a call over pages whose chunks impl
// serves.
static inline constexpr AttentionImpl impl_of_few(AttentionImpl impl) {
  return decodes(impl) ? impl : AttentionImpl::kDecode;
}

// A call of chunks over pages leaves sequences of few queries to impl_of_few where that pays: their
// rows share one read of the keys, and all multiprocessors share their keys. With fixed splits it
// always does so: a sequence's keys are then cut in the same places beside chunks and without. The
// least queries of a sequence that impl itself is to serve; 0: it serves all.
static inline constexpr int64_t min_queries_of(AttentionImpl impl, const AttentionDescriptor& d) {
  const bool is_fixed = has_fixed_splits(d);
  const bool leaves_some =
      impl == AttentionImpl::kSm90 || (is_fixed && (impl == AttentionImpl::kSm80 || decodes(impl)));
  if (!leaves_some || d.page_size == 0 || d.seqlen_q < kMinPrefillQueries) return 0;
  AttentionDescriptor few = d;
  if (is_fixed) {
    few.seqlen_q = kMinPrefillQueries - 1;
  } else {
    few.seqlen_q = std::max<int64_t>(decode::kRowTile * d.num_heads_kv / d.num_heads_q, 1);
    if (few.seqlen_q >= d.seqlen_q) return 0;
    // How many may have few: each has one of the tokens beside the longest sequence's, and all of
    // those must find room in as many sequences.
    const int64_t tokens = d.total_q - d.seqlen_q;
    const int64_t room = (d.batch - 1) * d.seqlen_q - tokens;
    const int64_t others = std::min({d.batch - 1, tokens, room / (d.seqlen_q - few.seqlen_q)});
    if (others < 1) return 0;
    const int64_t least = others == 1 ? kMinKeysOfOneBesideChunks : kMinKeysBesideChunks;
    if (d.seqlen_k < (least + others - 1) / others) return 0;
  }
  return why_not(impl_of_few(impl), few) == nullptr ? few.seqlen_q + 1 : 0;
}

// Into how many parts the keys of a sequence are cut, so that few queries over many keys use every
// thread. On the CPU a function of shapes only, and not of the batch: a result does not depend on
// neighbours.
static inline constexpr int num_splits_of(AttentionImpl impl, const AttentionDescriptor& d) {
  if (impl == AttentionImpl::kSm90) {
    // Only where the batch is small: else its tiles are enough. Beside others' sequences how many
    // are its own is not known, nor how many keys they have: as many rows as there are tokens, and
    // few parts.
    const bool is_shared = d.min_queries > 0;
    const int block_rows = sm90::kMinBlockRows * (d.head_dim <= 128 ? 3 : 2) / 2;
    const int64_t rows = is_shared ? d.total_q : d.seqlen_q;
    const int64_t row_blocks = (rows + block_rows - 1) / block_rows;
    const int64_t heads = is_shared ? d.num_heads_q : d.batch * d.num_heads_q;
    if (has_fixed_splits(d) || heads == 0 || row_blocks >= d.num_sms / heads + 1) return 1;
    constexpr int64_t kMaxKeys = 4 * sm90::kMinPartKeys;
    const int64_t keys = is_shared && d.seqlen_k > kMaxKeys ? kMaxKeys : d.seqlen_k;
    return sm90::num_parts(heads * row_blocks, keys, d.num_sms);
  }
  const bool on_cpu = impl == AttentionImpl::kCpu;
  if (on_cpu && (d.page_size == 0 || d.seqlen_q > kMaxSplitQueries)) return 1;
  if (!on_cpu && !decodes(impl)) return 1;
  const auto most_parts = [&](int64_t keys) {
    return d.seqlen_k > 0 ? (d.seqlen_k + keys - 1) / keys : 1;
  };
  if (!on_cpu && d.seqlen_q >= kMinPrefillQueries) {
    return has_fixed_splits(d) ? static_cast<int>(most_parts(kMaxSplitKeys)) : 1;
  }
  if (d.split_keys > 0) return static_cast<int>(most_parts(d.split_keys));
  if (d.num_splits > 0) {
    const int64_t most = most_parts(kMinSplitKeys);
    return d.num_splits < most ? d.num_splits : static_cast<int>(most);
  }
  if (!on_cpu) return 1;
  const int64_t parts = d.seqlen_k / kMinSplitKeys;
  const int64_t most = parts < d.num_threads ? parts : d.num_threads;
  return static_cast<int>(most < 1 ? 1 : most);
}

static inline constexpr TileClass tile_class_of(AttentionImpl impl, const AttentionDescriptor& d) {
  switch (impl) {
    case AttentionImpl::kCpu: {
      if (is_8_bit_cache(d.kv_dtype)) return TileClass::kRow;
      const int64_t rows = d.seqlen_q * (d.num_heads_q / d.num_heads_kv);
      return rows <= kMaxDecodeRows ? TileClass::kRow : TileClass::kLarge;
    }
    case AttentionImpl::kSm80: return sm80_tile_class(d);
    case AttentionImpl::kSm90:
      if (d.page_size > 0) return TileClass::kPaged;
      if (!d.is_packed && d.seqlen_k <= sm90::max_few_keys(d.head_dim)) return TileClass::kFewKeys;
      return TileClass::kLarge;
    case AttentionImpl::kSm75: return TileClass::kLarge;
    case AttentionImpl::kDecode:
    case AttentionImpl::kDecodeSm75:
    case AttentionImpl::kSimt:
    case AttentionImpl::kNone: break;
  }
  return TileClass::kRow;
}

// What impl runs the call with. why_not must have had nothing to say.
static inline constexpr AttentionPlan plan_of(AttentionImpl impl, const AttentionDescriptor& d) {
  const bool is_decode = impl == AttentionImpl::kDecode;
  const bool is_wide = is_decode && decodes_wide(d);
  const decode::Config& config = decode_config(impl, d.head_dim, d.kv_dtype, is_wide);
  return {.impl = impl,
          .tile = tile_class_of(impl, d),
          .num_splits = num_splits_of(impl, d),
          .split_keys = decodes(impl) && has_fixed_splits(d) && d.seqlen_q >= kMinPrefillQueries
                            ? static_cast<int>(kMaxSplitKeys)
                            : d.split_keys,
          .fixed_splits = has_fixed_splits(d) && (decodes(impl) || impl == AttentionImpl::kCpu),
          .num_blocks =
              decodes(impl) ? d.num_sms * decode::resident_blocks(config, d.max_shared_bytes) : 0,
          .is_wide = is_wide,
          .by_warpgroups = is_wide && multiplies_by_warpgroups(d),
          .num_sms = d.num_sms,
          .cluster_blocks = is_wide     ? wide_cluster_blocks_of(d)
                            : is_decode ? cluster_blocks_of(d)
                                        : 0,
          .min_queries = d.min_queries,
          .max_queries = d.max_queries};
}

}  // namespace llamatelemetry
