// out[i] = sum_j softmax_j(score(q[i] . k[j])) v[j] over the keys j that query i sees, where q, k
// and v lie in strides. Few rows (decode): rows_cpu.h; many: tile_cpu.h.
// One item per (key head, sequence or tile of rows).
#include "attention/params.h"
#include "attention/tile_cpu.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

using Params = FlashAttnParams;

int64_t group_size(const Params& p) { return p.num_heads_q / p.num_heads_kv; }

template <typename Element>
struct FlashSource {
  using T = Element;
  static constexpr bool kHasAlibi = true;

  const Params& p;
  FlashSequence s;
  int64_t sequence;
  int64_t kv_head;
  int64_t group;  // query heads that share the key head
  int64_t head_dim;
  ScoreRule rule;

  FlashSource(const Params& params, int64_t index, int64_t head)
      : p(params),
        s(flash_sequence(params, index)),
        sequence(index),
        kv_head(head),
        group(group_size(params)),
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
  void find_keys(KeyRange keys, const T** rows) const { find(p.k, keys, rows); }
  void find_values(KeyRange keys, const T** rows) const { find(p.v, keys, rows); }
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
  void finish(int64_t row, const float* o, float largest, float sum) const {
    const bool is_packed = p.cu_seqlens_q != nullptr;
    const int64_t lse_row = (is_packed ? 0 : sequence * p.num_heads_q) + head(row);
    write_row(o, largest, sum, head_dim, result(row),
              p.lse + lse_row * (is_packed ? p.total_q : p.seqlen_q) + token(row));
  }
};

bool has_few_rows(const Params& p) { return p.seqlen_q * group_size(p) <= kFewRows; }

template <typename T>
void few_rows_items(const Params& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    attend_rows(FlashSource<T>(p, item / p.num_heads_kv, item % p.num_heads_kv));
  }
}

template <typename T>
void many_rows_items(const Tiled<Params>& tiles, int64_t begin, int64_t end) {
  const Params& p = tiles.p;
  attend_tiles(
      tiles, begin, end,
      [&](int64_t i) { return flash_sequence(p, i).num_queries * group_size(p); },
      [&](int64_t i, int64_t kv_head) { return FlashSource<T>(p, i, kv_head); });
}

void few_rows_body(const Params& p, int64_t begin, int64_t end) {
  dispatch_level_dtype(
      p.dtype, [&](auto type) { few_rows_items<typename decltype(type)::type>(p, begin, end); });
}

void many_rows_body(const Tiled<Params>& tiles, int64_t begin, int64_t end) {
  dispatch_level_dtype(tiles.p.dtype, [&](auto type) {
    many_rows_items<typename decltype(type)::type>(tiles, begin, end);
  });
}

}  // namespace

Error launch_flash_attn(const Params& p, Stream) {
  if (has_few_rows(p)) {
    const double row_ns = 0.07 * static_cast<double>(p.head_dim * p.seqlen_k);
    const auto num_rows = static_cast<double>(p.seqlen_q * group_size(p));
    parallel_over<few_rows_body>("flash_attn",
                                 {p.batch * p.num_heads_kv, 100.0 + row_ns * num_rows}, p);
  } else {
    const Tiled<Params> tiles =
        tiled(p, p.seqlen_q * group_size(p), p.total_q * group_size(p), p.num_heads_kv);
    const Work work{tiles.num_items, 10000.0};
    parallel_over<many_rows_body>("flash_attn", work, tiles);
  }
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER_BF16(launch_flash_attn, FlashAttnParams)
