// out[i] = sum_j softmax_j(softmax_scale * q[i] . k[j]) v[j] over the keys j that query i sees,
// kept in pages of a cache. Few rows (decode): decode.h; many (prefill): prefill.h.
// One item per (split, key head, sequence or tile of rows); splits are merged by a second launch.
#include <memory>
#include <type_traits>

#include "attention/cpu/decode.h"
#include "attention/cpu/prefill.h"
#include "attention/params.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

using Params = AttentionParams;

// Of one row: token and query head folded into index.
template <typename T>
T* result_of(const Params& p, int64_t index) {
  return static_cast<T*>(p.out) + index * p.head_dim;
}
template <typename T>
void write_result(const Params& p, int64_t index, const float* o, float row_max, float sum) {
  write_row(o, row_max, sum, p.head_dim, result_of<T>(p, index),
            p.lse + index % p.num_heads_q * p.total_q + index / p.num_heads_q);
}

// One sequence, key head and split of the keys. A 16-bit cache beside float32 queries is converted
// in registers as rows are loaded.
template <typename Element, typename StoredElement = Element>
struct PagedSource {
  using T = Element;
  using Stored = StoredElement;
  static constexpr bool kAsTheyLie = true;
  static constexpr bool kHasAlibi = true;

  const Params& p;
  int64_t sequence;
  int64_t kv_head;
  int64_t split;
  int64_t first_query;
  int64_t num_queries;
  int64_t num_keys;
  int64_t head_dim;
  ScoreRule rule;

  PagedSource(const Params& params, int64_t index, int64_t head, int64_t split_index)
      : p(params),
        sequence(index),
        kv_head(head),
        split(split_index),
        first_query(params.cu_seqlens_q[index]),
        num_queries(params.cu_seqlens_q[index + 1] - first_query),
        num_keys(params.cache_seqlens[index]),
        head_dim(params.head_dim),
        rule{params.softmax_scale, params.softcap, params.alibi_slopes != nullptr} {}

  int64_t num_rows() const { return num_queries * p.group_size; }
  // Token and query head of a row, folded: where its results lie.
  int64_t index_of(int64_t row) const {
    const int64_t token = first_query + row / p.group_size;
    return (token * p.num_heads_kv + kv_head) * p.group_size + row % p.group_size;
  }
  void find(const Heads& cache, KeyRange keys, const Stored** rows) const {
    const int32_t* table = p.block_table + sequence * p.block_table_stride;
    int64_t page = keys.begin / p.k.page_size;
    int64_t slot = keys.begin % p.k.page_size;
    for (int64_t key = keys.begin; key < keys.end; ++page, slot = 0) {
      const Stored* row = static_cast<const Stored*>(cache.data) +
                          table[page] * cache.batch_stride + slot * cache.token_stride +
                          kv_head * cache.head_stride;
      const int64_t run = smaller(p.k.page_size - slot, keys.end - key);
      for (int64_t i = 0; i < run; ++i) *rows++ = row + i * cache.token_stride;
      key += run;
    }
  }

  const T* query(int64_t row) const {
    const int64_t token = first_query + row / p.group_size;
    return static_cast<const T*>(p.q.data) + token * p.q.token_stride + head(row) * p.q.head_stride;
  }
  KeyRange keys(int64_t row) const {
    return paged_keys(p, num_keys, num_queries, row / p.group_size);
  }
  // This split of the keys that any of rows [begin, end) sees.
  KeyRange keys(int64_t begin, int64_t end) const {
    const KeyRange own = part(split);
    const int64_t first = larger(own.begin, keys(begin).begin);
    return {first, larger(first, smaller(own.end, keys(end - 1).end))};
  }
  // The keys of a split: of all that any row of the sequence sees, not of these alone.
  KeyRange part(int64_t index) const {
    if (p.plan.num_splits == 1) return {0, INT64_MAX};
    if (const int64_t size = p.plan.split_keys; size > 0) return {index * size, (index + 1) * size};
    const KeyRange all{keys(0).begin, keys(num_rows() - 1).end};
    const int64_t step = p.plan.fixed_splits ? kBlockKeys : 4;
    const int64_t size =
        round_up(ceil_div(larger(all.end - all.begin, 0), p.plan.num_splits), step);
    return {all.begin + index * size, all.begin + (index + 1) * size};
  }
  void find_keys(KeyRange keys, const Stored** rows) const { find(p.k.rows, keys, rows); }
  void find_values(KeyRange keys, const Stored** rows) const { find(p.v.rows, keys, rows); }
  int64_t head(int64_t row) const { return kv_head * p.group_size + row % p.group_size; }
  float slope(int64_t row) const {
    return p.alibi_slopes[sequence * p.alibi_batch_stride + head(row)];
  }
  float position(int64_t row) const {
    return static_cast<float>(num_keys - num_queries + row / p.group_size);
  }
  float sink(int64_t row) const {  // of one split: they are added up
    return p.sinks == nullptr || split > 0 ? -INFINITY : p.sinks[head(row)];
  }
  int64_t partial_of(int64_t row) const {
    return split * p.total_q * p.num_heads_q + index_of(row);
  }
  // A split's result, or the whole one where there is one split.
  const void* result(int64_t row) const {
    if (p.plan.num_splits == 1) return result_of<T>(p, index_of(row));
    return p.partial_out + partial_of(row) * head_dim;
  }
  void finish(int64_t row, const float* o, float row_max, float sum) const {
    if (p.plan.num_splits == 1) return write_result<T>(p, index_of(row), o, row_max, sum);
    const int64_t partial = partial_of(row);
    p.partial_stats[2 * partial] = row_max;
    p.partial_stats[2 * partial + 1] = sum;
    if (sum != 0) load_row(o, head_dim, 1.0f, p.partial_out + partial * head_dim, head_dim);
  }
};

// The same over a cache of 8 bits, whose rows are multiplied out a block at a time. For decode.h
// alone: it asks for a block's keys and values once, and for a query right before it copies it.
template <typename Element>
struct EightBitSource {
  using T = float;
  using Stored = float;
  static constexpr bool kAsTheyLie = false;
  static constexpr bool kHasAlibi = true;

  struct Scratch {
    alignas(64) float query[kMaxHeadDim];
    alignas(64) float keys[kBlockKeys * kMaxHeadDim];
    alignas(64) float values[kBlockKeys * kMaxHeadDim];
  };
  PagedSource<Element> stored;
  Scratch& scratch;
  int64_t head_dim;
  ScoreRule rule;

  EightBitSource(const PagedSource<Element>& source, Scratch& memory)
      : stored(source), scratch(memory), head_dim(source.head_dim), rule(source.rule) {}

  int64_t num_rows() const { return stored.num_rows(); }
  const float* query(int64_t row) const {
    load_row(stored.query(row), head_dim, 1.0f, scratch.query, head_dim);
    return scratch.query;
  }
  KeyRange keys(int64_t row) const { return stored.keys(row); }
  KeyRange keys(int64_t begin, int64_t end) const { return stored.keys(begin, end); }
  void find_keys(KeyRange keys, const float** rows) const {
    find(stored.p.k, keys, scratch.keys, rows);
  }
  void find_values(KeyRange keys, const float** rows) const {
    find(stored.p.v, keys, scratch.values, rows);
  }
  float slope(int64_t row) const { return stored.slope(row); }
  float position(int64_t row) const { return stored.position(row); }
  float sink(int64_t row) const { return stored.sink(row); }
  void finish(int64_t row, const float* o, float row_max, float sum) const {
    stored.finish(row, o, row_max, sum);
  }

 private:
  void find(const KeyValueView& view, KeyRange keys, float* memory, const float** rows) const {
    const int32_t* table = stored.p.block_table + stored.sequence * stored.p.block_table_stride;
    for (int64_t key = keys.begin; key < keys.end; ++key, memory += kMaxHeadDim) {
      const int64_t page = table[key / view.page_size], slot = key % view.page_size;
      const auto at = [&](const Heads& x) {
        return page * x.batch_stride + slot * x.token_stride + stored.kv_head * x.head_stride;
      };
      const auto* row = static_cast<const uint8_t*>(view.rows.data) + at(view.rows);
      const float scale = static_cast<const float*>(view.scales.data)[at(view.scales)];
      if (view.dtype == DType::kInt8) {
        for (int64_t c = 0; c < head_dim; ++c) memory[c] = static_cast<int8_t>(row[c]) * scale;
      } else {
        for (int64_t c = 0; c < head_dim; ++c) memory[c] = e4m3_to_float(row[c]) * scale;
      }
      *rows++ = memory;
    }
  }
};

template <typename T>
void merge_rows(const Params& p, int64_t begin, int64_t end) {
  const int64_t num_rows = p.total_q * p.num_heads_q;
  for (int64_t index = begin; index < end; ++index) {
    float row_max = kNoScore;
    for (int64_t split = 0; split < p.plan.num_splits; ++split) {
      row_max = fmaxf(row_max, p.partial_stats[2 * (split * num_rows + index)]);
    }
    float o[kMaxHeadDim] = {};
    float sum = 0;
    for (int64_t split = 0; split < p.plan.num_splits; ++split) {
      const int64_t partial = split * num_rows + index;
      const float* stats = p.partial_stats + 2 * partial;
      if (stats[1] == 0) continue;  // no key: partial_out was not written
      const float weight = exp2f(stats[0] - row_max);
      sum += stats[1] * weight;
      const float* part = p.partial_out + partial * p.head_dim;
      for (int64_t c = 0; c < p.head_dim; ++c) o[c] += part[c] * weight;
    }
    write_result<T>(p, index, o, row_max, sum);
  }
}

template <typename T, typename Stored>
void decode_items(const Params& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t split = item / (p.batch * p.num_heads_kv);
    const PagedSource<T, Stored> source(p, item / p.num_heads_kv % p.batch, item % p.num_heads_kv,
                                        split);
    if constexpr (std::is_same_v<T, Stored>) {
      if (is_8_bit_cache(p.k.dtype)) {
        using Scratch = typename EightBitSource<T>::Scratch;
        thread_local const std::unique_ptr<Scratch> scratch(new Scratch);  // too large for stacks
        attend_rows(EightBitSource<T>(source, *scratch));
        continue;
      }
    }
    attend_rows(source);
  }
}

template <typename T, typename Stored>
void prefill_items(const Tiled<Params>& tiles, int64_t begin, int64_t end) {
  const Params& p = tiles.p;
  attend_tiles(
      tiles, begin, end,
      [&](int64_t i) { return (p.cu_seqlens_q[i + 1] - p.cu_seqlens_q[i]) * p.group_size; },
      [&](int64_t i, int64_t head) {  // the key heads of each split in turn
        return PagedSource<T, Stored>(p, i, head % p.num_heads_kv, head / p.num_heads_kv);
      });
}

// Calls body with the Types of q and of keys and values. 8-bit caches are dispatched by q's dtype
// alone. Levels with bfloat16 instructions are compiled for bfloat16 queries only
// (LT_CPU_LAUNCHER_BF16).
template <typename Body>
void dispatch_types(const Params& p, Body&& body) {
#if !defined(__AVX512BF16__)
  if (p.dtype == DType::kFloat32 && p.k.dtype == DType::kFloat16) {
    return body(Type<float>{}, Type<Half>{});
  }
  if (p.dtype == DType::kFloat32 && p.k.dtype == DType::kBFloat16) {
    return body(Type<float>{}, Type<BFloat16>{});
  }
#endif
  dispatch_level_dtype(p.dtype, [&](auto type) { body(type, type); });
}

void decode_body(const Params& p, int64_t begin, int64_t end) {
  dispatch_types(p, [&](auto type, auto stored) {
    decode_items<typename decltype(type)::type, typename decltype(stored)::type>(p, begin, end);
  });
}

void prefill_body(const Tiled<Params>& tiles, int64_t begin, int64_t end) {
  dispatch_types(tiles.p, [&](auto type, auto stored) {
    prefill_items<typename decltype(type)::type, typename decltype(stored)::type>(tiles, begin,
                                                                                  end);
  });
}

void merge_body(const Params& p, int64_t begin, int64_t end) {
  dispatch_level_dtype(
      p.dtype, [&](auto type) { merge_rows<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace

Error launch_paged_attention(const Params& p, Stream) {
  // Costs are rough: they only decide whether a second core is worth it (cpu/parallel.h).
  const auto head_dim = static_cast<double>(p.head_dim);
  if (p.plan.tile == TileClass::kRow) {
    // Lengths are not known here: half of what the table can hold.
    const auto keys = static_cast<double>(p.seqlen_k) / 2.0;
    const double key_ns = 0.25 * head_dim * static_cast<double>(p.seqlen_q);
    const Work work{p.plan.num_splits * p.batch * p.num_heads_kv,
                    100.0 + keys * key_ns / static_cast<double>(p.plan.num_splits)};
    parallel_over<decode_body>("paged_attention", work, p);
  } else {
    const Tiled<Params> tiles = tiled(p, p.seqlen_q * p.group_size, p.total_q * p.group_size,
                                      p.plan.num_splits * p.num_heads_kv);
    const Work work{tiles.num_items, 10000.0};
    parallel_over<prefill_body>("paged_attention", work, tiles);
  }
  if (p.plan.num_splits > 1) {
    const Work work{p.total_q * p.num_heads_q,
                    20.0 + 0.1 * head_dim * static_cast<double>(p.plan.num_splits)};
    parallel_over<merge_body>("paged_attention merge", work, p);
  }
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER_BF16(launch_paged_attention, AttentionParams)
