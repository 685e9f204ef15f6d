// out[i] = sum_j softmax_j(score(q[i] . k[j])) v[j] over the keys j that query i sees, where q, k
// and v lie in strides. Few rows (decode): decode.h; many: prefill.h.
// One item per (key head, sequence or tile of rows).
#include "attention/cpu/decode.h"
#include "attention/cpu/prefill.h"
#include "attention/params.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

using Params = AttentionParams;

template <typename Element>
struct FlashSource {
  using T = Element;
  using Stored = Element;
  static constexpr bool kAsTheyLie = true;
  static constexpr bool kHasAlibi = true;

  const Params& p;
  SequenceSpan s;
  int64_t sequence;
  int64_t kv_head;
  int64_t group;  // query heads that share the key head
  int64_t head_dim;
  ScoreRule rule;

  FlashSource(const Params& params, int64_t index, int64_t head)
      : p(params),
        s(sequence_span(params, index)),
        sequence(index),
        kv_head(head),
        group(params.group_size),
        head_dim(params.head_dim),
        rule{params.softmax_scale, params.softcap, params.alibi_slopes != nullptr} {}

  int64_t num_rows() const { return s.num_queries * group; }
  int64_t token(int64_t row) const { return s.first_query + row / group; }
  int64_t head(int64_t row) const { return kv_head * group + row % group; }
  const T* row_of(const Heads& x, int64_t t, int64_t h) const {
    return static_cast<const T*>(x.data) + sequence * x.batch_stride + t * x.token_stride +
           h * x.head_stride;
  }
  void find(const Heads& x, KeyRange keys, const T** rows) const {
    const T* row = row_of(x, s.first_key + keys.begin, kv_head);
    for (int64_t i = 0; i < keys.end - keys.begin; ++i) rows[i] = row + i * x.token_stride;
  }

  const T* query(int64_t row) const { return row_of(p.q, token(row), head(row)); }
  KeyRange keys(int64_t row) const {
    return window_keys(p.window_left, p.window_right, s.num_keys, s.num_queries, row / group);
  }
  KeyRange keys(int64_t begin, int64_t end) const { return {keys(begin).begin, keys(end - 1).end}; }
  void find_keys(KeyRange keys, const T** rows) const { find(p.k.rows, keys, rows); }
  void find_values(KeyRange keys, const T** rows) const { find(p.v.rows, keys, rows); }
  float slope(int64_t row) const {
    return p.alibi_slopes[sequence * p.alibi_batch_stride + head(row)];
  }
  float position(int64_t row) const {
    return static_cast<float>(s.num_keys - s.num_queries + row / group);
  }
  float sink(int64_t row) const { return p.sinks == nullptr ? -INFINITY : p.sinks[head(row)]; }
  T* result(int64_t row) const {
    const int64_t first = p.cu_seqlens_q != nullptr ? 0 : sequence * p.seqlen_q;
    return static_cast<T*>(p.out) + ((first + token(row)) * p.num_heads_q + head(row)) * head_dim;
  }
  void finish(int64_t row, const float* o, float row_max, float sum) const {
    const bool is_packed = p.cu_seqlens_q != nullptr;
    const int64_t lse_row = (is_packed ? 0 : sequence * p.num_heads_q) + head(row);
    write_row(o, row_max, sum, head_dim, result(row),
              p.lse + lse_row * (is_packed ? p.total_q : p.seqlen_q) + token(row));
  }
};

template <typename T>
void decode_items(const Params& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    attend_rows(FlashSource<T>(p, item / p.num_heads_kv, item % p.num_heads_kv));
  }
}

template <typename T>
void prefill_items(const Tiled<Params>& tiles, int64_t begin, int64_t end) {
  const Params& p = tiles.p;
  attend_tiles(
      tiles, begin, end, [&](int64_t i) { return sequence_span(p, i).num_queries * p.group_size; },
      [&](int64_t i, int64_t kv_head) { return FlashSource<T>(p, i, kv_head); });
}

void decode_body(const Params& p, int64_t begin, int64_t end) {
  dispatch_level_dtype(
      p.dtype, [&](auto type) { decode_items<typename decltype(type)::type>(p, begin, end); });
}

void prefill_body(const Tiled<Params>& tiles, int64_t begin, int64_t end) {
  dispatch_level_dtype(tiles.p.dtype, [&](auto type) {
    prefill_items<typename decltype(type)::type>(tiles, begin, end);
  });
}

}  // namespace

Error launch_dense_attention(const Params& p, Stream) {
  // Costs are rough: they only decide whether a second core is worth it (cpu/parallel.h).
  if (p.plan.tile == TileClass::kRow) {
    const double row_ns = 0.07 * static_cast<double>(p.head_dim * p.seqlen_k);
    const auto num_rows = static_cast<double>(p.seqlen_q * p.group_size);
    parallel_over<decode_body>("flash_attn", {p.batch * p.num_heads_kv, 100.0 + row_ns * num_rows},
                               p);
  } else {
    const Tiled<Params> tiles =
        tiled(p, p.seqlen_q * p.group_size, p.total_q * p.group_size, p.num_heads_kv);
    const Work work{tiles.num_items, 10000.0};
    parallel_over<prefill_body>("flash_attn", work, tiles);
  }
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER_BF16(launch_dense_attention, AttentionParams)
