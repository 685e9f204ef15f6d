// The tiles of decode.cuh on Hopper, for up to 64 rows of a key head: a warpgroup's wgmma
// multiplies them by a tile of 64 keys, which is so read from shared memory once and not by each of
// four warps. Drafts are verified so: 16 queries of four heads a key head are 64 rows.
//
// Floor: reading keys and values. A multiprocessor waits some 1750 clocks for those of 64 keys of
// 128 columns, and needs 512 for their products and 256 for their exponentials. Two blocks share
// it: while one exponentiates the other multiplies. Plan, segments and parts are decode.cuh's.
// Without softcap and ALiBi, which decode.cuh serves.
#pragma once

#include <type_traits>

#include "attention/decode/decode.cuh"
#include "attention/sm90/softmax.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace llamatelemetry::decode {

// A tile's keys or values as wgmma takes them: blocks of 64 columns, [keys][128 bytes] each,
// swizzled by 128 bytes.
template <typename T, int kHeadDim>
struct WarpgroupTile {
  using Element = T;
  static constexpr bool kHasScales = false;
  static constexpr int kRowChunks = kHeadDim / 8;  // of 16 bytes
  static constexpr int kColumnBlock = 64;
  static constexpr int kRowBytes = 128;  // of a block
  static constexpr int kBlockBytes = kTileKeys * kRowBytes;
  static constexpr int kBytes = (kHeadDim + kColumnBlock - 1) / kColumnBlock * kBlockBytes;

  struct Stage {  // where a warp's 16 keys and values of a tile go
    char* k;
    char* v;
  };
  static __device__ uint32_t offset(int row, int chunk) {
    return chunk / 8 * kBlockBytes + row * kRowBytes + (chunk % 8 ^ row % 8) * 16;
  }
};

// Merging of 64 rows, whose parts are 32 KB: many loads of a thread are under way at once.
template <typename T, Config kConfig>
struct WarpgroupMerging : Merging<T, kConfig, false> {
  using Base = Merging<T, kConfig, false>;
  static constexpr int kPartsAtOnce = kMaxPartsAtOnce - 1;  // the last place: of what is there
  static constexpr int kItemsAtOnce = 4;
  static constexpr int kLoadedParts = 4;
  using Base::kItems, Base::kNumThreads, Base::kRowVectors, Base::kVector;
  static_assert(Base::kItems % kItemsAtOnce == 0);
  using Base::p, Base::segment, Base::shared, Base::block_step;

  // A warpgroup's share of the tiles attended, accumulators of wgmma.
  __device__ void leave_rows(const float (&o)[Base::kHeadDim / 2], const float (&max)[2],
                             const float (&sum)[2]) const {
    const int lane = Base::lane(), warp = Base::warp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      const float row_sum = quad_reduce<Sum>(sum[half]);
      if (Base::first_row_of_warp() + row >= segment.num_rows) continue;
#pragma unroll
      for (int j = 0; j < Base::kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(&shared.o[warp][row][8 * j + lane % 4 * 2]) = {
            o[4 * j + 2 * half], o[4 * j + 2 * half + 1]};
      }
      shared.stats[warp][row] = {max[half], row_sum};
    }
  }

  // As Merging::combine.
  template <typename BlockOf>
  __device__ void combine(BlockOf block_of) const {
    const int first_block = block_of(0);
    const int num_parts = (static_cast<int>(blockIdx.x) - first_block) / block_step;
#pragma unroll 1
    for (int begin = 0; begin < num_parts; begin += kPartsAtOnce) {
      const int count = min(kPartsAtOnce, num_parts - begin);
      this->gather_stats(begin, count, block_of);
      if (static_cast<int>(threadIdx.x) < segment.num_rows) take_stats(threadIdx.x, count);
      __syncthreads();
#pragma unroll 1
      for (int item = 0; item < kItems; item += kItemsAtOnce) {
        add_parts(first_block + begin * block_step, count, threadIdx.x + item * kNumThreads);
      }
    }
    Base::finish();  // a thread writes what it has just put there
    Base::clear_flags(first_block);
  }

 private:
  // Adds `count` parts to kItemsAtOnce of this thread's vectors.
  __device__ void add_parts(int first_part, int count, int vector) const {
    float4* own[kItemsAtOnce];
    const float2* factors[kItemsAtOnce];
    float4 o[kItemsAtOnce];
    int rows[kItemsAtOnce], columns[kItemsAtOnce];
#pragma unroll
    for (int k = 0; k < kItemsAtOnce; ++k) {
      // Past the last row: parts of that row again, which nobody keeps.
      const int i = vector + k * kNumThreads;
      rows[k] = min(i / kRowVectors, segment.num_rows - 1);
      columns[k] = i % kRowVectors * kVector;
      factors[k] = shared.part_stats[rows[k]];
      own[k] =
          reinterpret_cast<float4*>(&shared.o[rows[k] / kRowTile][rows[k] % kRowTile][columns[k]]);
      o[k] = float4{};
      if (i / kRowVectors < segment.num_rows) o[k] = scaled(*own[k], factors[k][kPartsAtOnce].x);
    }
#pragma unroll 1
    for (int first = 0; first < count; first += kLoadedParts) {
      float4 part[kLoadedParts][kItemsAtOnce];
#pragma unroll
      for (int i = 0; i < kLoadedParts; ++i) {
        const int which = min(first + i, count - 1);
#pragma unroll
        for (int k = 0; k < kItemsAtOnce; ++k) {
          const int64_t at = Base::place(first_part + which * block_step, rows[k]);
          part[i][k] = __ldcg(reinterpret_cast<const float4*>(Base::part_of(at, columns[k])));
        }
      }
#pragma unroll
      for (int i = 0; i < kLoadedParts; ++i) {
        if (first + i >= count) break;
#pragma unroll
        for (int k = 0; k < kItemsAtOnce; ++k) {
          const float factor = factors[k][first + i].x;
          o[k].x += part[i][k].x * factor;
          o[k].y += part[i][k].y * factor;
          o[k].z += part[i][k].z * factor;
          o[k].w += part[i][k].w * factor;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kItemsAtOnce; ++k) {
      if ((vector + k * kNumThreads) / kRowVectors < segment.num_rows) *own[k] = o[k];
    }
  }
  static __device__ float4 scaled(const float4& x, float factor) {
    return {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
  }
  // A row's statistics of `count` parts, to the factors that bring them and what is there to the
  // maximum of all.
  __device__ void take_stats(int row, int count) const {
    float2& own = shared.stats[row / kRowTile][row % kRowTile];
    float2(&stats)[kMaxPartsAtOnce] = shared.part_stats[row];
    float row_max = own.x;
    for (int i = 0; i < count; ++i) row_max = fmaxf(row_max, stats[i].x);
    const float base = finite_or_zero(row_max);
    const float rescale = ptx::exp2_approx(own.x - base);
    float sum = own.y * rescale;
    for (int i = 0; i < count; ++i) {
      stats[i].x = ptx::exp2_approx(stats[i].x - base);
      sum += stats[i].y * stats[i].x;
    }
    stats[kPartsAtOnce].x = rescale;
    own = {row_max, sum};
  }
};

template <typename T, Config kConfig>
struct WarpgroupDecode {
  static_assert(kConfig.row_tile == kWideRowTile && !kConfig.is_8_bit());
  using Plain = Decode<T, kConfig, false>;
  using Params = AttentionParams;
  using Merge = WarpgroupMerging<T, kConfig>;
  using Sequence = typename Plain::Sequence;
  using Tile = WarpgroupTile<T, kConfig.head_dim>;
  using Loader = decode::Loader<Tile>;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kCapability = 90;
  static constexpr int kNumThreads = Plain::kNumThreads;
  static constexpr int kMinBlocks = kConfig.blocks_per_sm;
  static constexpr bool kCutsSegments = true;
  static constexpr int kDepth = 16;  // of one wgmma

  struct alignas(1024) Shared {
    union {
      struct {
        char k[Tile::kBytes], v[Tile::kBytes];
      } tiles[kStages];
      typename Merge::Shared merge;
    };
    char queries[Tile::kBytes];
  };
  static_assert(kWideRowTile == kTileKeys);
  static constexpr int kSharedBytes = sizeof(Shared);

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(1024) char s_tiles[];
    Plain::template attend_units<WarpgroupDecode>(p, *reinterpret_cast<Shared*>(s_tiles));
  }

  // As Decode::attend.
  static __device__ void attend(const Merge& merge, int tile, int num_tiles, Shared& shared) {
    const Params& p = merge.p;
    const Sequence& s = merge.s;
    const int first_key = (s.begin / kTileKeys + tile) * kTileKeys;
    const int end = min(s.end, first_key + num_tiles * kTileKeys);
    Loader loader(p, merge.index, merge.segment.kv_head, s.first_key, first_key, {s.begin, end});
    loader.find_page();
    RowStats rows;
    float o[kHeadDim / 2] = {};
    const auto query_of = [&](int row) {
      return row < merge.segment.num_rows ? Plain::query_of(merge, row) : nullptr;
    };
    attend_keys<WholeBlock>(
        p, loader, first_key, num_tiles, shared.tiles, shared.queries,
        [&] {  // the barrier before the first product comes after
          load_queries<kNumThreads>(static_cast<int>(p.head_dim), query_of, shared.queries);
        },
        [&] { return Plain::rules_of(p, s, merge.index, merge.segment, end); },
        [&] { return keys_of_all(merge); }, rows, o);
    merge.leave_rows(o, rows.max, rows.sum);
    __syncthreads();
  }

  // The warpgroup that attends keys together: a block's only one.
  struct WholeBlock {
    static constexpr int kKeysApart = kTileKeys;  // from one of its tiles to the next
    static __device__ int warp() { return Plain::warp(); }
    static __device__ void sync() { __syncthreads(); }
  };

  // num_tiles tiles of keys from first_key on, where loader stands, added to rows and o; after it
  // nobody of the group reads the tiles any more. load_queries() fills the rows of `queries`.
  // rules_of(): of this thread's rows. seen_of(): the keys that every row sees.
  template <typename Group, typename KeysLoader, typename Tiles, typename LoadQueries,
            typename RulesOf, typename SeenOf>
  static __device__ void attend_keys(const Params& p, KeysLoader& loader, int first_key,
                                     int num_tiles, Tiles& tiles, const char* queries,
                                     const LoadQueries& load_queries, const RulesOf& rules_of,
                                     const SeenOf& seen_of, RowStats& rows,
                                     float (&o)[kHeadDim / 2]) {
    constexpr int kStages = std::extent_v<Tiles>;
    const auto wrapped = [](int stage) { return stage >= kStages ? stage - kStages : stage; };
    const int warp_rows = Group::warp() * kWarpKeys * Tile::kRowBytes;
    // The next tile, or an empty group of copies.
    const auto load = [&](int stage, bool exists) {
      if (!exists) return ptx::cp_async_commit();
      auto& free = tiles[stage];
      typename Tile::Stage to{free.k + warp_rows, free.v + warp_rows};
      loader.load(to);
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) load(i, i < num_tiles);
    load_queries();
    const RowRules rules = rules_of();
    const KeysRead seen_by_all = seen_of();
    const float scale = p.softmax_scale * kLog2E;
    const bool scales_first = !(scale > 0);  // else the exponential's argument takes it along
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < num_tiles; ++i) {
      ptx::cp_async_wait<kStages - 2>();
      ptx::fence_proxy_async_shared();
      // The tile is there, and nobody reads the one before any more.
      Group::sync();
      float x[kTileKeys / 2];
      multiply_keys(queries, tiles[stage].k, x);
      load(wrapped(stage + kStages - 1), i + kStages - 1 < num_tiles);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(x);
      const int key = first_key + i * Group::kKeysApart;
      const bool hides = key < seen_by_all.begin || key + kTileKeys > seen_by_all.end;
      if (scales_first) {
#pragma unroll
        for (int j = 0; j < kTileKeys / 2; ++j) x[j] *= scale;
      }
      if (hides) hide(rules, key, x);
      exponentiate(scales_first ? 1.0f : scale, rows, x, o);
      multiply_values(x, tiles[stage].v, o);
      stage = wrapped(stage + 1);
    }
    ptx::cp_async_wait<0>();
    Group::sync();
  }

  // Keys that every row of the segment sees: what its first and its last query see.
  static __device__ KeysRead keys_of_all(const Merge& merge) {
    const Segment& segment = merge.segment;
    const KeyRange first = merge.s.keys_of(merge.p, segment.query(0));
    const KeyRange last = merge.s.keys_of(merge.p, segment.query(segment.num_rows - 1));
    return {static_cast<int>(last.begin), static_cast<int>(first.end)};
  }

  // As rows of a tile. query_of(row): where it lies, or nullptr.
  template <int kThreads, typename QueryOf>
  static __device__ void load_queries(int head_dim, const QueryOf& query_of, char* queries) {
    const int num_chunks = head_dim / 8;
    for (int i = threadIdx.x; i < kWideRowTile * Tile::kRowChunks; i += kThreads) {
      const int row = i / Tile::kRowChunks, chunk = i % Tile::kRowChunks;
      const T* from = query_of(row);
      uint4 values{};
      if (from != nullptr && chunk < num_chunks) {
        values = reinterpret_cast<const uint4*>(from)[chunk];
      }
      *reinterpret_cast<uint4*>(queries + Tile::offset(row, chunk)) = values;
    }
  }

  // Ends without waiting.
  static __device__ void multiply_keys(const char* queries, const char* keys,
                                       float (&x)[kTileKeys / 2]) {
    const uint64_t q = ptx::k_major_descriptor(ptx::shared_address(queries));
    const uint64_t k = ptx::k_major_descriptor(ptx::shared_address(keys));
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / kDepth; ++step) {
      constexpr int kSteps = Tile::kColumnBlock / kDepth;
      const int at = step / kSteps * Tile::kBlockBytes + step % kSteps * kDepth * 2;
      ptx::wgmma_shared<T, kTileKeys>(x, q + (at >> 4), k + (at >> 4), step > 0);
    }
    ptx::wgmma_commit();
  }
  static __device__ void multiply_values(const float (&x)[kTileKeys / 2], const char* values,
                                         float (&o)[kHeadDim / 2]) {
    uint32_t weights[kTileKeys / kDepth][4];
    pack_weights<T, kTileKeys>(x, weights);
    const uint64_t v = ptx::mn_major_descriptor(ptx::shared_address(values), Tile::kBlockBytes);
    ptx::wgmma_hold(o);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileKeys / kDepth; ++step) {
      constexpr int kStepBytes = kDepth * Tile::kRowBytes;
      ptx::wgmma_registers<T, kHeadDim>(o, weights[step], v + (step * kStepBytes >> 4), true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(o);
  }

  static __device__ int column() { return Plain::lane() % 4 * 2; }  // a thread's first of a tile

  static __device__ void hide(const RowRules& rules, int first, float (&x)[kTileKeys / 2]) {
    const int at = first + column();
    const int begins[2] = {rules.begin[0] - at, rules.begin[1] - at};
    const int ends[2] = {rules.end[0] - at, rules.end[1] - at};
    mask_scores<MaskKind::kLocal, kTileKeys>(x, begins, ends);
  }

  // Online softmax: dot products to weights; o is rescaled where a row's maximum grew by much.
  static __device__ void exponentiate(float scale, RowStats& rows, float (&x)[kTileKeys / 2],
                                      float (&o)[kHeadDim / 2]) {
    float rescale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float tile_max = max_of_row<kTileKeys>(x, half) * scale;
      const bool grows = tile_max > rows.max[half] + kRescaleSlack;
      const float row_max = grows ? tile_max : rows.max[half];
      const float base = finite_or_zero(row_max);
      rescale[half] = ptx::exp2_approx(rows.max[half] - base);
      rows.max[half] = row_max;
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = x[4 * j + 2 * half + e];
          score = ptx::exp2_approx(fmaf(score, scale, -base));
        }
      }
      rows.sum[half] = rows.sum[half] * rescale[half] + sum_of_row<kTileKeys>(x, half);
    }
    if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) rescale_rows(o, rescale);
  }
};

}  // namespace llamatelemetry::decode
