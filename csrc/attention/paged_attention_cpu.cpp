// out[i] = sum_j softmax_j(softmax_scale * q[i] . k[j]) v[j] over the keys j that query i sees,
// kept in pages of a cache.       (online softmax: Milakov & Gimelshein 2018; tiles and splits: Dao
// 2022)
//
// The rows of a key head are the (query, head) pairs that share it: row r is query r / group_size,
// head r % group_size. Few rows (decode) are bound by reading the cache once: lanes run along
// head_dim. Many rows (prefill) are bound by arithmetic: lanes are rows, so that scores need no
// horizontal sums and keys no transposing. Accumulates in float.
// One item per (split, key head, sequence or tile of rows); splits are merged by a second launch.
#include <cmath>

#include "attention/params.h"
#include "common/parallel.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

using Params = PagedAttentionParams;

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kNoScore =
    -3.4028234664e38f;          // below every finite score, and no NaN when subtracted
constexpr int kBlockKeys = 64;  // keys that are scored before their values are added
constexpr int kFewRows = 16;    // up to here lanes run along head_dim

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int clamp_to(int64_t x, int limit) {
  return static_cast<int>(smaller(larger(x, 0), limit));
}

// Calls body with the integral constant n, 1 <= n <= kMax.
template <int kMax, typename Body>
LT_INLINE void with_constant(int n, Body&& body) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_constant<kMax - 1>(n, body);
  }
  body(std::integral_constant<int, kMax>{});
}

// One sequence and one key head.
struct Sequence {
  int64_t index;
  int64_t kv_head;
  int64_t first_query;
  int64_t num_queries;
  int64_t num_keys;
  int64_t num_rows;
};

Sequence sequence_of(const Params& p, int64_t index, int64_t kv_head) {
  const int64_t first = p.cu_seqlens_q[index];
  const int64_t num_queries = p.cu_seqlens_q[index + 1] - first;
  return {index, kv_head, first, num_queries, p.cache_seqlens[index], num_queries * p.group_size};
}

KeyRange keys_of_row(const Params& p, const Sequence& s, int64_t row) {
  return visible_keys(p, s.num_keys, s.num_queries, row / p.group_size);
}

// Split number split of the keys that any of rows [begin, end) sees.
KeyRange keys_of_split(const Params& p, const Sequence& s, int64_t begin, int64_t end,
                       int64_t split) {
  const KeyRange all{keys_of_row(p, s, begin).begin, keys_of_row(p, s, end - 1).end};
  const int64_t size = round_up(ceil_div(larger(all.end - all.begin, 0), p.num_splits), 4);
  const int64_t first = smaller(all.begin + split * size, all.end);
  return {first, smaller(first + size, all.end)};
}

// Token and query head of a row, folded: where its results lie.
int64_t index_of_row(const Params& p, const Sequence& s, int64_t row) {
  const int64_t token = s.first_query + row / p.group_size;
  return token * p.num_heads_kv * p.group_size + s.kv_head * p.group_size + row % p.group_size;
}

template <typename T>
const T* query_of_row(const Params& p, const Sequence& s, int64_t row) {
  const int64_t token = s.first_query + row / p.group_size;
  const int64_t head = s.kv_head * p.group_size + row % p.group_size;
  return static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride;
}

// rows[i] = row of key or value keys.begin + i.
template <typename T>
void find_rows(const Params& p, const PagedCache& cache, const Sequence& s, KeyRange keys,
               const T** rows) {
  const int32_t* table = p.block_table + s.index * p.block_table_stride;
  int64_t page = keys.begin / p.page_size;
  int64_t slot = keys.begin % p.page_size;
  for (int64_t key = keys.begin; key < keys.end; ++page, slot = 0) {
    const T* row = static_cast<const T*>(cache.data) + table[page] * cache.block_stride +
                   slot * cache.slot_stride + s.kv_head * cache.head_stride;
    const int64_t run = smaller(p.page_size - slot, keys.end - key);
    for (int64_t i = 0; i < run; ++i) *rows++ = row + i * cache.slot_stride;
    key += run;
  }
}

// Scores leave the dot product in bits (times log2 e), unless softcap has yet to be applied to
// them.
float query_factor(const Params& p) {
  return p.softcap > 0 ? p.softmax_scale / p.softcap : p.softmax_scale * kLog2E;
}

void apply_softcap(const Params& p, float* scores, int64_t count) {
  if (p.softcap == 0) return;
  for (int64_t i = 0; i < count; ++i) scores[i] = p.softcap * kLog2E * tanhf(scores[i]);
}

// dst[0..padded) = src[0..head_dim) * factor, then zeros.
template <typename T>
void load_row(const T* src, int64_t head_dim, float factor, float* dst, int64_t padded) {
  const Vec scale = vec_set(factor);
  int64_t c = 0;
  for (; c + Vec::kLanes <= head_dim; c += Vec::kLanes)
    vec_store(dst + c, vec_load(src + c) * scale);
  for (; c < head_dim; ++c) dst[c] = to_float(src[c]) * factor;
  for (; c < padded; ++c) dst[c] = 0.0f;
}

// o is not yet divided by sum; largest and sum are of the scores in bits.
template <typename T>
void write_row(const Params& p, int64_t index, const float* o, float largest, float sum) {
  const int64_t num_heads_q = p.num_heads_kv * p.group_size;
  const float factor = sum == 0 ? 0.0f : 1.0f / sum;
  T* out = static_cast<T*>(p.out) + index * p.head_dim;
  int64_t c = 0;
  for (; c + Vec::kLanes <= p.head_dim; c += Vec::kLanes) {
    vec_store(out + c, vec_load(o + c) * vec_set(factor));
  }
  for (; c < p.head_dim; ++c) out[c] = from_float<T>(o[c] * factor);
  p.lse[index % num_heads_q * p.total_q + index / num_heads_q] =
      sum == 0 ? -INFINITY : largest * kLn2 + logf(sum);
}

// A split's result, or the whole one where there is one split.
template <typename T>
void finish_row(const Params& p, int64_t index, int64_t split, const float* o, float largest,
                float sum) {
  if (p.num_splits == 1) return write_row<T>(p, index, o, largest, sum);
  const int64_t partial = split * p.total_q * p.num_heads_kv * p.group_size + index;
  p.partial_stats[2 * partial] = largest;
  p.partial_stats[2 * partial + 1] = sum;
  if (sum != 0) load_row(o, p.head_dim, 1.0f, p.partial_out + partial * p.head_dim, p.head_dim);
}

template <typename T>
void merge_rows(const Params& p, int64_t begin, int64_t end) {
  const int64_t num_rows = p.total_q * p.num_heads_kv * p.group_size;
  for (int64_t index = begin; index < end; ++index) {
    float largest = kNoScore;
    for (int64_t split = 0; split < p.num_splits; ++split) {
      largest = fmaxf(largest, p.partial_stats[2 * (split * num_rows + index)]);
    }
    float o[kMaxHeadDim] = {};
    float sum = 0;
    for (int64_t split = 0; split < p.num_splits; ++split) {
      const int64_t partial = split * num_rows + index;
      const float* stats = p.partial_stats + 2 * partial;
      if (stats[1] == 0) continue;  // no key: partial_out was not written
      const float weight = exp2f(stats[0] - largest);
      sum += stats[1] * weight;
      const float* part = p.partial_out + partial * p.head_dim;
      for (int64_t c = 0; c < p.head_dim; ++c) o[c] += part[c] * weight;
    }
    write_row<T>(p, index, o, largest, sum);
  }
}

// ---- Few rows: lanes run along head_dim ----

#if defined(LT_ISA_AVX512)
constexpr int kMaxRows = 4;  // rows that share each load of a key or value: what registers hold
#else
constexpr int kMaxRows = 2;
#endif

// scores[r][j] = q[r] . keys[j]. keys holds pointers up to a multiple of 4 past num_keys.
template <int kRows, typename T>
void score_few(const float* q, int64_t q_stride, const T* const* keys, int num_keys,
               int64_t head_dim, float* scores) {
  for (int j = 0; j < num_keys; j += 4) {
    Vec sum[kRows][4];
    for (auto& row : sum) {
      for (Vec& x : row) x = vec_set(0);
    }
    const auto add = [&](int64_t c, auto load) {
      Vec key[4];
      for (int u = 0; u < 4; ++u) key[u] = load(keys[j + u] + c);
      for (int r = 0; r < kRows; ++r) {
        const Vec query = vec_load(q + r * q_stride + c);
        for (int u = 0; u < 4; ++u) sum[r][u] = vec_fma(query, key[u], sum[r][u]);
      }
    };
    int64_t c = 0;
    for (; c + Vec::kLanes <= head_dim; c += Vec::kLanes) {
      add(c, [](const T* x) { return vec_load(x); });
    }
    if (const int left = static_cast<int>(head_dim - c); left > 0) {
      add(c, [left](const T* x) { return vec_load_first(x, left); });
    }
    for (int r = 0; r < kRows; ++r) {
      vec_sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kBlockKeys + j);
    }
  }
}

// o[r][c..] = o[r][c..] * scale[r] + sum_j p[r][j] values[j][c..], kVecs registers wide.
template <int kRows, int kVecs, typename T, typename Load>
LT_INLINE void add_values(const float* p, const float* scale, const T* const* values, int num_keys,
                          int64_t c, float* o, int64_t o_stride, Load load) {
  // A block is summed by itself: long sums round less that way.
  Vec sum[kRows][kVecs];
  for (auto& row : sum) {
    for (Vec& x : row) x = vec_set(0);
  }
  for (int j = 0; j < num_keys; ++j) {
    Vec value[kVecs];
    for (int v = 0; v < kVecs; ++v) value[v] = load(values[j] + c + v * Vec::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = vec_set(p[r * kBlockKeys + j]);
      for (int v = 0; v < kVecs; ++v) sum[r][v] = vec_fma(weight, value[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      float* to = o + r * o_stride + c + v * Vec::kLanes;
      vec_store(to, vec_fma(vec_load(to), vec_set(scale[r]), sum[r][v]));
    }
  }
}

template <int kRows, typename T>
void add_values_few(const float* p, const float* scale, const T* const* values, int num_keys,
                    int64_t head_dim, float* o, int64_t o_stride) {
  constexpr int kVecs = 4;
  const auto whole = [](const T* x) { return vec_load(x); };
  int64_t c = 0;
  for (; c + kVecs * Vec::kLanes <= head_dim; c += kVecs * Vec::kLanes) {
    add_values<kRows, kVecs>(p, scale, values, num_keys, c, o, o_stride, whole);
  }
  for (; c + Vec::kLanes <= head_dim; c += Vec::kLanes) {
    add_values<kRows, 1>(p, scale, values, num_keys, c, o, o_stride, whole);
  }
  if (const int left = static_cast<int>(head_dim - c); left > 0) {
    add_values<kRows, 1>(p, scale, values, num_keys, c, o, o_stride,
                         [left](const T* x) { return vec_load_first(x, left); });
  }
}

// Turns scores [begin, end) of a block into weights, those outside into 0; returns by how much the
// results of earlier blocks shrink.
float weigh(float* scores, int begin, int end, int num_keys, float* largest, float* sum) {
  const int padded = static_cast<int>(round_up(num_keys, Vec::kLanes));
  for (int j = 0; j < begin; ++j) scores[j] = -INFINITY;
  for (int j = end; j < padded; ++j) scores[j] = -INFINITY;
  Vec peak = vec_set(*largest);
  for (int j = 0; j < padded; j += Vec::kLanes) peak = vec_max(vec_load(scores + j), peak);
  const float old = *largest;
  *largest = vec_reduce_max(peak);
  const Vec base = vec_set(*largest);
  Vec total = vec_set(0);
  for (int j = 0; j < padded; j += Vec::kLanes) {
    const Vec weight = vec_exp2(vec_load(scores + j) - base);
    vec_store(scores + j, weight);
    total = total + weight;
  }
  const float scale = exp2f(old - *largest);
  *sum = *sum * scale + vec_sum(total);
  return scale;
}

// Rows [begin, end) of a sequence, at most kFewRows, over the keys of one split.
template <typename T>
void few_rows(const Params& p, const Sequence& s, int64_t begin, int64_t end, int64_t split) {
  alignas(64) float q[kFewRows * kMaxHeadDim];
  alignas(64) float o[kFewRows * kMaxHeadDim];
  float largest[kFewRows];
  float sum[kFewRows] = {};
  const int64_t stride = round_up(p.head_dim, Vec::kLanes);
  const int num_rows = static_cast<int>(end - begin);
  for (int r = 0; r < num_rows; ++r) {
    load_row(query_of_row<T>(p, s, begin + r), p.head_dim, query_factor(p), q + r * stride, stride);
    for (int64_t c = 0; c < stride; c += Vec::kLanes) vec_store(o + r * stride + c, vec_set(0));
    largest[r] = kNoScore;
  }
  const int num_parts = static_cast<int>(ceil_div(num_rows, kMaxRows));
  const KeyRange keys = keys_of_split(p, s, begin, end, split);
  for (int64_t first = keys.begin; first < keys.end; first += kBlockKeys) {
    const KeyRange block{first, smaller(first + kBlockKeys, keys.end)};
    const int num_keys = static_cast<int>(block.end - block.begin);
    const T* key_rows[kBlockKeys];
    const T* value_rows[kBlockKeys];
    find_rows(p, p.k, s, block, key_rows);
    find_rows(p, p.v, s, block, value_rows);
    for (int j = num_keys; j % 4 != 0; ++j) key_rows[j] = key_rows[num_keys - 1];
    for (int part = 0; part < num_parts; ++part) {
      const int row = num_rows * part / num_parts;
      with_constant<kMaxRows>(num_rows * (part + 1) / num_parts - row, [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        alignas(64) float scores[kRows * kBlockKeys];
        float scale[kRows];
        score_few<kRows>(q + row * stride, stride, key_rows, num_keys, p.head_dim, scores);
        for (int r = 0; r < kRows; ++r) {
          const KeyRange seen = keys_of_row(p, s, begin + row + r);
          apply_softcap(p, scores + r * kBlockKeys, num_keys);
          scale[r] = weigh(scores + r * kBlockKeys, clamp_to(seen.begin - first, num_keys),
                           clamp_to(seen.end - first, num_keys), num_keys, &largest[row + r],
                           &sum[row + r]);
        }
        add_values_few<kRows>(scores, scale, value_rows, num_keys, p.head_dim, o + row * stride,
                              stride);
      });
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    finish_row<T>(p, index_of_row(p, s, begin + r), split, o + r * stride, largest[r], sum[r]);
  }
}

// ---- Many rows: lanes are rows ----

#if defined(LT_ISA_AVX512)
constexpr int kPanel = 8;  // keys, then elements of head_dim, that share each load of rows
#else
constexpr int kPanel = 4;
#endif
constexpr int kPanelVecs = 3;  // registers of rows; with kPanel, what the register file holds
constexpr int kTileRows = 96;
constexpr int kTileFloats = kTileRows * 128;

// Rows of one tile of queries: a multiple of every level's kPanelVecs * kLanes.
int64_t rows_per_tile(const Params& p) {
  return p.head_dim * kTileRows <= kTileFloats ? kTileRows : kTileRows / 2;
}

// sum[i][v] += a[i * a_row + k * a_step] * b[k * b_step + v * kLanes ...] for k < depth.
template <int kVecs>
LT_INLINE void multiply_panel(const float* a, int64_t a_row, int64_t a_step, const float* b,
                              int64_t b_step, int64_t depth, Vec (&sum)[kPanel][kVecs]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec rows[kVecs];
    for (int v = 0; v < kVecs; ++v) rows[v] = vec_load(b + k * b_step + v * Vec::kLanes);
    for (int i = 0; i < kPanel; ++i) {
      const Vec x = vec_set(a[i * a_row + k * a_step]);
      for (int v = 0; v < kVecs; ++v) sum[i][v] = vec_fma(x, rows[v], sum[i][v]);
    }
  }
}

// A tile's state. Row r of the tile is column r; columns past num_rows compute on zeros.
struct Tile {
  int64_t num_rows;
  int64_t stride;                    // of q and o
  alignas(64) float q[kTileFloats];  // [head_dim, stride]
  alignas(64) float o[kTileFloats];  // [head_dim, stride]
  alignas(64) float largest[kTileRows];
  alignas(64) float sum[kTileRows];
  alignas(64) float keys[kBlockKeys * kMaxHeadDim];    // [kBlockKeys, kHeadStride]
  alignas(64) float values[kBlockKeys * kMaxHeadDim];  // [kBlockKeys, kHeadStride]
};

// Columns [column, column + kVecs * kLanes) against keys [begin, end) of the block that tile holds.
// lowest and highest [kTileRows] bound what each column sees of it, where is_masked.
template <int kHeadStride, int kVecs>
void add_block(const Params& p, Tile& tile, int64_t column, int begin, int end, bool is_masked,
               const float* lowest, const float* highest) {
  constexpr int kColumns = kVecs * Vec::kLanes;
  alignas(64) float scores[kBlockKeys * kColumns];
  constexpr int64_t kDepth = 64;  // summed by itself: long sums round less that way
  for (int j = begin; j < end; j += kPanel) {
    for (int64_t c = 0; c < p.head_dim; c += kDepth) {
      Vec sum[kPanel][kVecs];
      for (auto& row : sum) {
        for (Vec& x : row) x = vec_set(0);
      }
      multiply_panel(tile.keys + j * kHeadStride + c, kHeadStride, 1,
                     tile.q + c * tile.stride + column, tile.stride,
                     smaller(kDepth, p.head_dim - c), sum);
      for (int i = 0; i < kPanel && j + i < end; ++i) {
        for (int v = 0; v < kVecs; ++v) {
          float* score = scores + (j + i) * kColumns + v * Vec::kLanes;
          vec_store(score, c == 0 ? sum[i][v] : vec_load(score) + sum[i][v]);
        }
      }
    }
  }
  apply_softcap(p, scores + begin * kColumns, (end - begin) * kColumns);

  Vec scale[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    const int64_t lane = column + v * Vec::kLanes;
    float* column_scores = scores + v * Vec::kLanes;
    if (is_masked) {
      // Infinity on the visible side of a bound, -infinity on the other.
      const Vec infinity = vec_set(INFINITY);
      const Vec low = vec_load(lowest + lane) - vec_set(0.5f);
      const Vec high = vec_load(highest + lane) - vec_set(0.5f);
      for (int j = begin; j < end; ++j) {
        const Vec key = vec_set(static_cast<float>(j));
        const Vec bound = vec_min((key - low) * infinity, (high - key) * infinity);
        vec_store(column_scores + j * kColumns,
                  vec_min(vec_load(column_scores + j * kColumns), bound));
      }
    }
    const Vec old = vec_load(tile.largest + lane);
    Vec largest = old;
    for (int j = begin; j < end; ++j)
      largest = vec_max(vec_load(column_scores + j * kColumns), largest);
    Vec total = vec_set(0);
    for (int j = begin; j < end; ++j) {
      const Vec weight = vec_exp2(vec_load(column_scores + j * kColumns) - largest);
      vec_store(column_scores + j * kColumns, weight);
      total = total + weight;
    }
    scale[v] = vec_exp2(old - largest);
    vec_store(tile.largest + lane, largest);
    vec_store(tile.sum + lane, vec_fma(vec_load(tile.sum + lane), scale[v], total));
  }

  for (int64_t c = 0; c < p.head_dim; c += kPanel) {
    float* o = tile.o + c * tile.stride + column;
    Vec sum[kPanel][kVecs];
    for (auto& row : sum) {
      for (Vec& x : row) x = vec_set(0);
    }
    multiply_panel(tile.values + begin * kHeadStride + c, 1, kHeadStride, scores + begin * kColumns,
                   kColumns, end - begin, sum);
    for (int i = 0; i < kPanel; ++i) {
      for (int v = 0; v < kVecs; ++v) {
        float* to = o + i * tile.stride + v * Vec::kLanes;
        vec_store(to, vec_fma(vec_load(to), scale[v], sum[i][v]));
      }
    }
  }
}

// Rows [begin, end) of a sequence over the keys of one split.
template <typename T, int kHeadStride>
void many_rows(const Params& p, const Sequence& s, int64_t begin, int64_t end, int64_t split) {
  Tile tile;
  tile.num_rows = end - begin;
  tile.stride = rows_per_tile(p);
  const int64_t num_columns = round_up(tile.num_rows, Vec::kLanes);
  for (int64_t r = 0; r < num_columns; ++r) {
    float row[kMaxHeadDim] = {};
    if (r < tile.num_rows) {
      load_row(query_of_row<T>(p, s, begin + r), p.head_dim, query_factor(p), row, p.head_dim);
    }
    for (int64_t c = 0; c < p.head_dim; ++c) tile.q[c * tile.stride + r] = row[c];
    for (int64_t c = 0; c < p.head_dim; ++c) tile.o[c * tile.stride + r] = 0;
    tile.largest[r] = kNoScore;
    tile.sum[r] = 0;
  }

  const KeyRange keys = keys_of_split(p, s, begin, end, split);
  for (int64_t first = keys.begin; first < keys.end; first += kBlockKeys) {
    const KeyRange block{first, smaller(first + kBlockKeys, keys.end)};
    const int num_keys = static_cast<int>(block.end - block.begin);
    const T* rows[kBlockKeys];
    find_rows(p, p.k, s, block, rows);
    int j = 0;
    for (; j < num_keys; ++j) load_row(rows[j], p.head_dim, 1.0f, tile.keys + j * kHeadStride, 0);
    for (; j % kPanel != 0; ++j) {  // the last panel is scored whole
      for (int64_t c = 0; c < p.head_dim; ++c) tile.keys[j * kHeadStride + c] = 0;
    }
    find_rows(p, p.v, s, block, rows);
    for (j = 0; j < num_keys; ++j) {
      load_row(rows[j], p.head_dim, 1.0f, tile.values + j * kHeadStride, 0);
    }

    alignas(64) float lowest[kTileRows];
    alignas(64) float highest[kTileRows];
    for (int64_t r = 0; r < num_columns; ++r) {
      const KeyRange seen = keys_of_row(p, s, smaller(begin + r, end - 1));
      lowest[r] = static_cast<float>(clamp_to(seen.begin - first, num_keys));
      highest[r] = static_cast<float>(clamp_to(seen.end - first, num_keys));
    }
    for (int64_t column = 0; column < num_columns;) {
      const int64_t num_vecs = smaller(kPanelVecs, (num_columns - column) / Vec::kLanes);
      const int64_t last = smaller(column + num_vecs * Vec::kLanes, num_columns) - 1;
      // Both bounds grow with the row.
      const int low = static_cast<int>(lowest[column]);
      const int high = static_cast<int>(highest[last]);
      const bool is_masked = lowest[last] > low || highest[column] < high;
      if (low < high) {
        with_constant<kPanelVecs>(static_cast<int>(num_vecs), [&](auto vecs) {
          add_block<kHeadStride, decltype(vecs)::value>(p, tile, column, low, high, is_masked,
                                                        lowest, highest);
        });
      }
      column = last + 1;
    }
  }
  for (int64_t r = 0; r < tile.num_rows; ++r) {
    float o[kMaxHeadDim];
    for (int64_t c = 0; c < p.head_dim; ++c) o[c] = tile.o[c * tile.stride + r];
    finish_row<T>(p, index_of_row(p, s, begin + r), split, o, tile.largest[r], tile.sum[r]);
  }
}

// ---- Items ----

bool has_few_rows(const Params& p) { return p.max_seqlen_q * p.group_size <= kFewRows; }

// Sequences' tiles one after the other; each sequence's last tile may be partly empty.
int64_t max_tiles(const Params& p) { return p.total_q * p.group_size / rows_per_tile(p) + p.batch; }

int64_t tiles_of(const Params& p, int64_t sequence) {
  const int64_t num_queries = p.cu_seqlens_q[sequence + 1] - p.cu_seqlens_q[sequence];
  return ceil_div(num_queries * p.group_size, rows_per_tile(p));
}

template <typename T>
void few_rows_items(const Params& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t split = item / (p.batch * p.num_heads_kv);
    const int64_t index = item / p.num_heads_kv % p.batch;
    const Sequence s = sequence_of(p, index, item % p.num_heads_kv);
    for (int64_t row = 0; row < s.num_rows; row += kFewRows) {
      few_rows<T>(p, s, row, smaller(row + kFewRows, s.num_rows), split);
    }
  }
}

template <typename T>
void many_rows_items(const Params& p, int64_t begin, int64_t end) {
  int64_t num_tiles = 0;
  for (int64_t i = 0; i < p.batch; ++i) num_tiles += tiles_of(p, i);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t split = item / (max_tiles(p) * p.num_heads_kv);
    const int64_t kv_head = item / max_tiles(p) % p.num_heads_kv;
    const int64_t turn = item % max_tiles(p);
    if (turn >= num_tiles) continue;
    // First, last, second, last but one: causal tiles grow, and chunks of items should cost alike.
    int64_t tile = turn % 2 == 0 ? turn / 2 : num_tiles - 1 - turn / 2;
    int64_t index = 0;
    for (; tile >= tiles_of(p, index); ++index) tile -= tiles_of(p, index);
    const Sequence s = sequence_of(p, index, kv_head);
    const int64_t row = tile * rows_per_tile(p);
    const int64_t last = smaller(row + rows_per_tile(p), s.num_rows);
    if (p.head_dim <= 64) {
      many_rows<T, 64>(p, s, row, last, split);
    } else if (p.head_dim <= 128) {
      many_rows<T, 128>(p, s, row, last, split);
    } else {
      many_rows<T, kMaxHeadDim>(p, s, row, last, split);
    }
  }
}

void few_rows_body(const Params& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { few_rows_items<typename decltype(type)::type>(p, begin, end); });
}

void many_rows_body(const Params& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { many_rows_items<typename decltype(type)::type>(p, begin, end); });
}

void merge_body(const Params& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&](auto type) { merge_rows<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace

Error launch_paged_attention(const Params& p, Stream) {
  const auto head_dim = static_cast<double>(p.head_dim);
  if (has_few_rows(p)) {
    // Lengths are not known here: half of what the table can hold.
    const auto keys = static_cast<double>(p.max_blocks * p.page_size) / 2.0;
    const double key_ns = 0.07 * head_dim * static_cast<double>(p.max_seqlen_q);
    const Work work{p.num_splits * p.batch * p.num_heads_kv,
                    100.0 + keys * key_ns / static_cast<double>(p.num_splits)};
    parallel_over<few_rows_body>("paged_attention", work, p);
  } else {
    const Work work{p.num_splits * p.num_heads_kv * max_tiles(p), 10000.0};
    parallel_over<many_rows_body>("paged_attention", work, p);
  }
  if (p.num_splits > 1) {
    const Work work{p.total_q * p.num_heads_kv * p.group_size,
                    20.0 + 0.1 * head_dim * static_cast<double>(p.num_splits)};
    parallel_over<merge_body>("paged_attention merge", work, p);
  }
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_paged_attention, PagedAttentionParams)
