// Many rows (prefill) of a Source (source.h) at once: blocks of keys are packed once for a tile
// of rows, which takes them a group of rows at a time. Bound by arithmetic: products.h.
//                  (online softmax: Milakov & Gimelshein 2018; tiles: Dao 2022)
// Where products take bfloat16, weights are rounded to it as torch rounds them.
#pragma once

#include <memory>

#if defined(__AMX_BF16__)
#include "attention/cpu/products_amx.h"
#else
#include "attention/cpu/products.h"
#endif
#include "cpu/parallel.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr int kMinTileRows = 96;
constexpr int kTileRowStep = 48;
static_assert(kTileRowStep % kGroupRows == 0 &&
              kMaxTileRows / 2 % kTileRowStep == 0);  // whole groups
constexpr int kTileFloats = kMaxTileRows * 128;

// A tile's state. Row r of the tile is column r % kGroupRows of group r / kGroupRows; columns past
// the last row compute on zeros.
struct Tile {
  alignas(64) float q[kTileFloats];  // words [groups, padded_dim / kPerWord, kGroupRows]
  alignas(64) float o[kTileFloats];  // [groups, padded_dim, kGroupRows]
  alignas(64) float row_max[kMaxTileRows];
  alignas(64) float sum[kMaxTileRows];
  alignas(64) float slope[kMaxTileRows];  // in log2 units
  alignas(64) float position[kMaxTileRows];
  KeyRange seen[kMaxTileRows];
  // Of the block of keys at hand: the bounds of what each row sees of it, its keys as words
  // [kTileKeys, kRowWords] and its values, see pack_values.
  alignas(64) float lowest[kMaxTileRows];
  alignas(64) float highest[kMaxTileRows];
  alignas(64) float keys[kTileKeys * kRowWords];
  alignas(64) float values[kTileKeys * kRowWords];
  alignas(64) float scores[kTileKeys * kGroupRows];  // of a group of rows, then its weights
  // The rows that are yet to be fetched, see look_ahead, and how many to fetch at a time.
  const void* ahead[2 * kMaxTileRows];
  int num_ahead;
  int64_t ahead_bytes;  // of each
  int fetched_at_once;
  const void* next_queries[kMaxTileRows];  // of the tile after this one, likely the thread's next
  int num_next;
};

// One for good: too large for small stacks.
Tile& tile_of_thread() {
  thread_local const std::unique_ptr<Tile> tile(new Tile);
  return *tile;
}

// Keys [begin, end) of a block, multiples of kSummed, as one group of rows takes them.
struct Span {
  int begin;
  int end;
  bool is_masked;
};

// What a block's scores still need: softcap, ALiBi and the mask; then the rows' maxima again.
template <typename Source, int kVecs>
void adjust_scores(const Source& source, const Tile& tile, int row, int64_t first, Span span,
                   float* scores, float* row_max) {
  constexpr int kColumns = kVecs * Vec::kLanes;
  apply_softcap(source.rule, scores + span.begin * kColumns, (span.end - span.begin) * kColumns);
  for (int v = 0; v < kVecs; ++v) {
    const int lane = row + v * Vec::kLanes;
    // Infinity on the visible side of a bound, -infinity on the other.
    const Vec infinity = vec_set(INFINITY);
    const Vec low = vec_load(tile.lowest + lane) - vec_set(0.5f);
    const Vec high = vec_load(tile.highest + lane) - vec_set(0.5f);
    Vec new_max = vec_load(tile.row_max + lane);
    for (int j = span.begin; j < span.end; ++j) {
      float* score = scores + j * kColumns + v * Vec::kLanes;
      Vec x = vec_load(score);
      if constexpr (Source::kHasAlibi) {
        if (source.rule.has_alibi) {
          const Vec away = vec_load(tile.position + lane) - vec_set(static_cast<float>(first + j));
          x = x - vec_load(tile.slope + lane) * vec_flip_sign(away, away);
        }
      }
      if (span.is_masked) {
        const Vec key = vec_set(static_cast<float>(j));
        x = vec_min(x, vec_min((key - low) * infinity, (high - key) * infinity));
      }
      vec_store(score, x);
      new_max = vec_max(x, new_max);
    }
    vec_store(row_max + v * Vec::kLanes, new_max);
  }
}

// Fetches more of the rows ahead; many at once would be dropped.
LT_INLINE void fetch_ahead(Tile& tile) {
  constexpr int64_t kLineBytes = 64;
  for (int n = 0; n < tile.fetched_at_once && tile.num_ahead > 0; ++n) {
    const auto* row = static_cast<const char*>(tile.ahead[--tile.num_ahead]);
    for (int64_t i = 0; i < tile.ahead_bytes; i += kLineBytes) __builtin_prefetch(row + i, 0, 2);
  }
}

// Rows [row, row + kVecs * kLanes) of the tile against span of the block of keys at first. Inlined
// into the loop over blocks: by itself GCC spills rows behind the constants of exp2
// (benchmarks/notes/attention.md).
template <typename Source, int kVecs>
LT_INLINE void add_block(const Source& source, Tile& tile, int row, int64_t first, Span span) {
  constexpr int kPer = kPerWord<typename Source::T>;
  constexpr int kColumns = kVecs * Vec::kLanes;
  float* scores = tile.scores;
  alignas(64) float row_max[kColumns];
  std::memcpy(row_max, tile.row_max + row, sizeof row_max);
  const int64_t depth = padded_dim(source.head_dim) / kPer;
  for (int j = span.begin; j < span.end; j += kStep) {
    fetch_ahead(tile);
    score_keys<kPer, kVecs>(tile.keys + j * kRowWords, tile.q + row * depth, depth,
                            dot_factor(source.rule), scores + j * kColumns, row_max);
  }
  if (span.is_masked || source.rule.softcap > 0 || source.rule.has_alibi) {
    adjust_scores<Source, kVecs>(source, tile, row, first, span, scores, row_max);
  }

  Vec scale[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    // The weight of the largest score is exactly 1, which rounding to bfloat16 leaves as it is.
    const Vec new_max = vec_load(row_max + v * Vec::kLanes);
    float* column = scores + v * Vec::kLanes;
    Vec total = vec_set(0);
    for (int j = span.begin; j < span.end; j += kPer) {
      Vec weight[kPer];
      for (int u = 0; u < kPer; ++u) {
        weight[u] = vec_exp2(vec_load(column + (j + u) * kColumns) - new_max);
        total = total + weight[u];
      }
      // Words of weights overtake the scores that are read: they are packed in place.
#if defined(__AVX512BF16__)
      if constexpr (kPer == 2) weight[0] = vec_round_pairs(weight[0], weight[1]);
#endif
      vec_store(column + j / kPer * kColumns, weight[0]);
    }
    const int lane = row + v * Vec::kLanes;
    scale[v] = vec_exp2(vec_load(tile.row_max + lane) - new_max);
    vec_store(tile.row_max + lane, new_max);
    vec_store(tile.sum + lane, vec_fma(vec_load(tile.sum + lane), scale[v], total));
  }

  float* o = tile.o + row * padded_dim(source.head_dim);
  add_values<kPer, kVecs>(tile.values, source.head_dim, span.begin, span.end, scores, scale, o);
}

// Elements or pairs of a row as words, then zeros; a null src stands for a row of zeros.
template <int kPer, typename T>
void pack_words(const T* src, int64_t head_dim, float factor, float* words) {
  const int64_t padded = padded_dim(head_dim);
  if (src == nullptr) {
    head_dim = 0;
  } else if constexpr (kPer == 1) {
    load_row(src, head_dim, factor, words, 0);
  } else {
    std::memcpy(words, src, static_cast<size_t>(head_dim) * sizeof(T));
  }
  for (int64_t c = head_dim / kPer; c < padded / kPer; ++c) words[c] = 0;
}

// Keys and values of the block of keys at first, and of those beside them that products take:
// whatever the tile, those that any row of the source sees, so that 0 * infinity depends on no
// other tile; the rest is zeros.
template <typename Source>
void pack_block(const Source& source, KeyRange block, int64_t first, Tile& tile) {
  using Stored = typename Source::Stored;
  constexpr int kPer = kPerWord<Stored>;
  static_assert(kPer == kPerWord<typename Source::T>);  // words of keys meet words of queries
  const KeyRange all{source.keys(0).begin, source.keys(source.num_rows() - 1).end};
  const auto from = static_cast<int>((block.begin - first) / kSummed * kSummed);
  const auto to = static_cast<int>(round_up(block.end - first, kSummed));
  const KeyRange found{larger(first + from, all.begin), smaller(first + to, all.end)};
  const Stored* rows[kTileKeys] = {};  // nullptr: zeros
  source.find_keys(found, rows + (found.begin - first));
  for (int j = from; j < to; ++j) {
    pack_words<kPer>(rows[j], source.head_dim, 1.0f, tile.keys + j * kRowWords);
  }
  source.find_values(found, rows + (found.begin - first));
  pack_values(rows, from, to, source.head_dim, tile.values);
}

// What the tile of rows from begin on fetches while it works on a block: the rows of keys, the
// block after it; beside the last block, where results go and then the next tile's queries, as far
// as the block's panels of keys last: under a causal mask few groups of rows see them.
template <typename Source>
void look_ahead(const Source& source, KeyRange keys, int64_t begin, int num_rows, Tile& tile) {
  static_assert(kTileKeys <= kMaxTileRows);  // ahead holds either
  int count = 0;
  int64_t element_bytes = sizeof(typename Source::T);
  if (keys.begin < keys.end) {
    element_bytes = sizeof(typename Source::Stored);
    const typename Source::Stored* rows[2 * kTileKeys];
    source.find_keys(keys, rows);
    source.find_values(keys, rows + (keys.end - keys.begin));
    for (; count < 2 * (keys.end - keys.begin); ++count) tile.ahead[count] = rows[count];
  } else {
    for (int i = 0; i < tile.num_next; ++i) tile.ahead[count++] = tile.next_queries[i];
    for (int r = num_rows - 1; r >= 0; --r) tile.ahead[count++] = source.result(begin + r);
  }
  const int64_t num_panels = ceil_div(num_rows, kGroupRows) * kTileKeys / kStep;
  tile.num_ahead = count;
  tile.ahead_bytes = source.head_dim * element_bytes;
  tile.fetched_at_once = static_cast<int>(ceil_div(count, num_panels));
}

template <typename Source>
void start_tile(const Source& source, int64_t begin, int num_rows, KeyRange keys, Tile& tile) {
  constexpr int kPer = kPerWord<typename Source::T>;
  const int64_t depth = padded_dim(source.head_dim) / kPer;
  const auto num_columns = static_cast<int>(round_up(num_rows, Vec::kLanes));
  float* words = tile.keys;  // of a group's rows: no keys are here yet
  for (int row = 0; row < num_columns; row += kGroupRows) {
    const auto height = static_cast<int>(smaller(kGroupRows, num_columns - row));
    for (int i = 0; i < height; ++i) {
      pack_words<kPer>(row + i < num_rows ? source.query(begin + row + i) : nullptr,
                       source.head_dim, dot_factor(source.rule), words + i * kRowWords);
    }
    vec_transpose(words, kRowWords, height, depth, tile.q + row * depth, kGroupRows);
    float* o = tile.o + row * padded_dim(source.head_dim);
    std::memset(o, 0,
                static_cast<size_t>(kGroupRows * padded_dim(source.head_dim)) * sizeof(float));
  }
  for (int r = 0; r < num_columns; ++r) {
    const float sink = r < num_rows ? source.sink(begin + r) : -INFINITY;
    tile.row_max[r] = first_row_max(sink);
    tile.sum[r] = first_sum(sink);
    const int64_t row = smaller(begin + r, begin + num_rows - 1);
    tile.seen[r] = source.keys(row);
    tile.seen[r] = {larger(tile.seen[r].begin, keys.begin), smaller(tile.seen[r].end, keys.end)};
    if constexpr (Source::kHasAlibi) {
      if (!source.rule.has_alibi) continue;
      tile.slope[r] = source.slope(row) * kLog2E;
      tile.position[r] = source.position(row);
    }
  }
}

template <typename Source>
void finish_tile(const Source& source, int64_t begin, int num_rows, Tile& tile) {
  float* o = tile.keys;  // of a group's rows: no keys are needed any more
  for (int row = 0; row < num_rows; row += kGroupRows) {
    const auto height = static_cast<int>(smaller(kGroupRows, num_rows - row));
    vec_transpose(tile.o + row * padded_dim(source.head_dim), kGroupRows, source.head_dim,
                  kGroupRows, o, kRowWords);
    for (int i = 0; i < height; ++i) {
      source.finish(begin + row + i, o + i * kRowWords, tile.row_max[row + i], tile.sum[row + i]);
    }
  }
}

// Rows [begin, end) of a source, at most kMaxTileRows. Blocks of keys start at multiples of
// kTileKeys, so that a row's result does not depend on the rows beside it.
template <typename Source>
void attend_tile(const Source& source, int64_t begin, int64_t end, Tile& tile) {
  const KeyRange keys = source.keys(begin, end);
  const int num_rows = static_cast<int>(end - begin);
  const int num_columns = static_cast<int>(round_up(num_rows, Vec::kLanes));
  start_tile(source, begin, num_rows, keys, tile);
  for (int64_t first = keys.begin - keys.begin % kTileKeys; first < keys.end; first += kTileKeys) {
    const KeyRange block{larger(first, keys.begin), smaller(first + kTileKeys, keys.end)};
    pack_block(source, block, first, tile);
    look_ahead(source, {block.end, smaller(block.end + kTileKeys, keys.end)}, begin, num_rows,
               tile);
    for (int row = 0; row < num_columns; row += kGroupRows) {
      const int last = static_cast<int>(smaller(row + kGroupRows, num_columns)) - 1;
      // Both bounds grow with the row.
      const int low = clamp_to(tile.seen[row].begin - first, kTileKeys);
      const int high = clamp_to(tile.seen[last].end - first, kTileKeys);
      if (low >= high) continue;
      Span span{low - low % kSummed, static_cast<int>(round_up(high, kSummed)), false};
      span.is_masked =
          tile.seen[last].begin - first > span.begin || tile.seen[row].end - first < span.end;
      for (int r = row; span.is_masked && r <= last; ++r) {
        tile.lowest[r] = static_cast<float>(clamp_to(tile.seen[r].begin - first, kTileKeys));
        tile.highest[r] = static_cast<float>(clamp_to(tile.seen[r].end - first, kTileKeys));
      }
      with_constant<kPanelVecs>(
          (last + 1 - row) / Vec::kLanes, [&](auto vecs) __attribute__((always_inline)) {
            add_block<Source, decltype(vecs)::value>(source, tile, row, first, span);
          });
    }
  }
  finish_tile(source, begin, num_rows, tile);
}

// ---- Items ----

// A launch over tiles of tile_rows rows.
template <typename Params>
struct Tiled {
  Params p;
  int64_t tile_rows;
  int64_t num_tiles;  // per key head, at most: each sequence's last tile may be partly empty
  int64_t num_items;  // of all key heads
};

// Tiles as large as keep every thread busy, the longest sequence in parts about equal; multiples of
// every level's kGroupRows.
template <typename Params>
Tiled<Params> tiled(const Params& p, int64_t longest_rows, int64_t total_rows, int64_t num_heads) {
  const int64_t max_rows =
      p.head_dim * kMaxTileRows <= kTileFloats ? kMaxTileRows : kMaxTileRows / 2;
  const int64_t share = total_rows * num_heads / (4 * num_threads());
  const int64_t limit =
      larger(smaller(share, max_rows) / kTileRowStep * kTileRowStep, kMinTileRows);
  const int64_t num_parts = larger(ceil_div(longest_rows, limit), 1);
  const int64_t tile_rows =
      larger(round_up(ceil_div(longest_rows, num_parts), kTileRowStep), kTileRowStep);
  const int64_t num_tiles = total_rows / tile_rows + p.batch;
  return {p, tile_rows, num_tiles, num_tiles * num_heads};
}

struct TileIndex {
  int64_t sequence;  // batch where there are fewer tiles
  int64_t tile;
};

// Tile number turn of a batch, in the order first, last, second, last but one: causal tiles grow,
// and chunks of items should cost alike. tiles_of(i) is how many tiles sequence i has.
template <typename TilesOf>
TileIndex find_tile(int64_t turn, int64_t batch, TilesOf tiles_of) {
  int64_t num_tiles = 0;
  for (int64_t i = 0; i < batch; ++i) num_tiles += tiles_of(i);
  if (turn >= num_tiles) return {batch, 0};
  TileIndex index{0, turn % 2 == 0 ? turn / 2 : num_tiles - 1 - turn / 2};
  for (; index.tile >= tiles_of(index.sequence); ++index.sequence) {
    index.tile -= tiles_of(index.sequence);
  }
  return index;
}

// Items [begin, end): num_tiles of key head 0, then of key head 1, ... rows_of(i) is how many rows
// each has of sequence i, source_of(i, head) their Source.
template <typename Params, typename RowsOf, typename SourceOf>
void attend_tiles(const Tiled<Params>& tiles, int64_t begin, int64_t end, RowsOf rows_of,
                  SourceOf source_of) {
  Tile& tile = tile_of_thread();
#if defined(__AMX_BF16__)
  const AmxScope amx;
#endif
  const auto index_of = [&](int64_t item) {
    return find_tile(item % tiles.num_tiles, tiles.p.batch,
                     [&](int64_t i) { return ceil_div(rows_of(i), tiles.tile_rows); });
  };
  // The first item from this one on that has rows, and its index; last where none has.
  const auto find_item = [&](int64_t item, int64_t last, TileIndex& index) {
    for (; item < last; ++item) {
      index = index_of(item);
      if (index.sequence != tiles.p.batch) break;
    }
    return item;
  };
  // Calls take(source, rows begin, rows end).
  const auto with_rows = [&](int64_t item, TileIndex index, auto take) {
    const auto source = source_of(index.sequence, item / tiles.num_tiles);
    const int64_t row = index.tile * tiles.tile_rows;
    take(source, row, smaller(row + tiles.tile_rows, source.num_rows()));
  };
  TileIndex index{};
  for (int64_t item = find_item(begin, end, index); item < end;) {
    TileIndex next_index{};
    const int64_t next = find_item(item + 1, tiles.num_items, next_index);
    tile.num_next = 0;
    if (next < tiles.num_items) {
      with_rows(next, next_index, [&](const auto& source, int64_t row, int64_t last) {
        while (row < last) tile.next_queries[tile.num_next++] = source.query(row++);
      });
    }
    with_rows(item, index, [&](const auto& source, int64_t row, int64_t last) {
      attend_tile(source, row, last, tile);
    });
    item = next;
    index = next_index;
  }
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
