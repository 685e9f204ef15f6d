// out[i] = sum_j softmax_j(softmax_scale * q[i] . k[j]) v[j] for few queries a sequence over many
// keys, dense or in pages: bound by reading keys and values once. (Flash-Decoding: Dao et al. 2023)
//
// Query heads that share a key head, of all queries of a sequence, are the 16 rows of
// mma.m16n8k16. Each of four warps takes 16 keys of a tile of 64, through its own ring of stages
// filled by cp.async, with its own online softmax, so tiles need no barrier.
// Pages are looked up a tile ahead. Rows of keys and values that no query sees are never read.
// Grid: as many blocks as the GPU holds; plan.cuh says what each does.
#pragma once

#include "attention/decode/merge.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/convert.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/swizzled_tile.cuh"

namespace llamatelemetry::decode {

// What two rows of a lane's fragments, group and group + 8, need beside their queries.
struct RowRules {
  int begin[2], end[2];  // keys they see
  float slope[2];        // ALiBi, in log2 units
  int position[2];       // among the keys
};

template <typename T, Config kConfig, bool kFixed>
struct Decode {
  using Params = AttentionParams;
  using Merge = Merging<T, kConfig, kFixed>;
  using Sequence = decode::Sequence<kFixed>;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kStages = kConfig.stages;
  using Tile = SwizzledTile<kHeadDim>;
  static constexpr int kCapability = 80;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kMinBlocks = kConfig.blocks_per_sm;
  static constexpr int kDimSteps = kHeadDim / 16;

  struct Stage {
    char k[Tile::bytes(kWarpKeys)];
    char v[Tile::bytes(kWarpKeys)];
  };
  struct alignas(128) Shared {
    union {
      Stage stages[kNumWarps][kStages];
      typename Merge::Shared merge;
    };
    char queries[kConfig.queries_in_registers ? 1 : Tile::bytes(kRowTile)];
  };
  static constexpr int kSharedBytes = sizeof(Shared);

  static __device__ int warp() { return threadIdx.x / kWarpSize; }
  static __device__ int lane() { return threadIdx.x % kWarpSize; }

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(128) char s_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(s_bytes);
    let_successors_start();
    wait_for_predecessors();
    const Plan<kFixed> plan(p);
    const Runs runs(plan.total_units(), gridDim.x, kFixed ? 1 : kMinRunTiles);
    const int block = blockIdx.x;
    if (block >= runs.num_runs) return;
    const int begin = runs.first_of(block);
    int end = runs.first_of(block + 1);
    if (begin >= end) return;
    // The pieces of a run in reverse: the one that later blocks wait for comes first, the one that
    // waits for earlier blocks last.
    int first_unit;  // of the sequence, among all
    int index = plan.find(end - 1, &first_unit);
    while (true) {
      const Sequence sequence(p, index);
      while (end > begin && end > first_unit) {
        const int which = (end - 1 - first_unit) / sequence.units;
        const int segment_begin = first_unit + which * sequence.units;
        const int from = max(begin, segment_begin);
        const Segment segment(p, sequence, which);
        const Merge merge{p, sequence, index, segment, shared.merge};
        attend_piece(merge, runs, segment_begin, from, end, shared);
        __syncthreads();  // the stages are free again
        end = from;
      }
      if (end == begin) return;
      do {
        --index;
        first_unit -= Sequence(p, index).work(p);
      } while (first_unit == end);
    }
  }

  // Units [from, end) of the segment that begins at segment_begin.
  static __device__ void attend_piece(const Merge& merge, const Runs& runs, int segment_begin,
                                      int from, int end, Shared& shared) {
    const int num_units = merge.s.units;
    const int block = blockIdx.x;
    const int last_block = runs.block_of(segment_begin + num_units - 1);
    const auto block_of = [&](int unit) { return runs.block_of(segment_begin + unit); };
    if constexpr (kFixed) {
      for (int unit = end - 1 - segment_begin; unit >= from - segment_begin; --unit) {
        const TileRange tiles = merge.s.tiles_of(unit);
        attend(merge, tiles.begin, tiles.end - tiles.begin, shared);
        if (num_units == 1) return merge.finish();
        merge.leave_part(unit);
        __syncthreads();  // the stages are free again
      }
      block == last_block ? merge.combine(block_of) : merge.announce();
    } else {
      attend(merge, from - segment_begin, end - from, shared);
      if (block_of(0) == last_block) {
        merge.finish();
      } else if (block == last_block) {
        merge.combine(block_of);
      } else {
        merge.leave_part(block);
        merge.announce();
      }
    }
  }

  // ---- Keys and values ----

  // Copies this warp's 16 keys and values of one tile after another. Lanes 0 to 15 find rows of
  // keys, the others rows of values.
  struct Loader {
    const Params& p;
    const Sequence& s;
    const int32_t* table;  // nullptr: dense
    const T* rows;         // of the head
    int64_t batch_stride, token_stride;
    int num_chunks;
    int key;   // that this lane finds next
    int page;  // which holds it

    __device__ Loader(const Params& p, const Sequence& s, int index, int kv_head, int first_key)
        : p(p), s(s), num_chunks(static_cast<int>(p.head_dim) / Tile::kChunkElements), page(0) {
      const KeyValueView& view = lane() < kWarpKeys ? p.k : p.v;
      rows = static_cast<const T*>(view.rows.data) + kv_head * view.rows.head_stride;
      batch_stride = view.rows.batch_stride;
      token_stride = view.rows.token_stride;
      table = view.page_size > 0 ? p.block_table + index * p.block_table_stride : nullptr;
      if (table == nullptr) rows += index * batch_stride + s.first_key * token_stride;
      key = first_key + warp() * kWarpKeys + lane() % kWarpKeys;
      find_page();
    }
    __device__ bool exists() const { return key >= s.begin && key < s.end; }
    __device__ void find_page() {
      if (table != nullptr && exists()) page = table[key / static_cast<int>(p.k.page_size)];
    }
    __device__ const T* row() const {
      if (!exists() || page < 0) return nullptr;
      if (table == nullptr) return rows + key * token_stride;
      return rows + page * batch_stride + key % static_cast<int>(p.k.page_size) * token_stride;
    }
    __device__ void load(Stage& stage) {
      const auto from = reinterpret_cast<unsigned long long>(row());
      key += kTileKeys;
      find_page();
      copy(ptx::shared_address(stage.k), from, 0);
      copy(ptx::shared_address(stage.v), from, kWarpKeys);
      ptx::cp_async_commit();
    }
    __device__ void copy(uint32_t to, unsigned long long row_of_lane, int first_lane) const {
#pragma unroll
      for (int i = lane(); i < kWarpKeys * Tile::kChunks; i += kWarpSize) {
        const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
        const auto* from =
            reinterpret_cast<const T*>(__shfl_sync(~0u, row_of_lane, first_lane + row));
        const bool valid = from != nullptr && chunk < num_chunks;
        ptx::cp_async_16_or_zeros(to + Tile::offset(row, chunk),
                                  valid ? from + chunk * Tile::kChunkElements : rows, valid);
      }
    }
  };

  // ---- Queries ----

  // Fragments of the queries in registers, or the address of this lane's in shared memory.
  struct Queries {
    uint32_t held[kConfig.queries_in_registers ? kDimSteps : 1][4];
    uint32_t address;

    __device__ void fragment(int step, uint32_t (&a)[4]) const {
      if constexpr (kConfig.queries_in_registers) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = held[step][i];
      } else {
        ptx::ldmatrix_x4(a, Tile::advance(address, 2 * step));
      }
    }
  };

  static __device__ const T* query_row(const Params& p, const Sequence& s, int index,
                                       const Segment& segment, int row) {
    return static_cast<const T*>(p.q.data) + index * p.q.batch_stride +
           (s.first_query + segment.query(row)) * p.q.token_stride +
           segment.head(row) * p.q.head_stride;
  }

  static __device__ void load_queries(const Params& p, const Sequence& s, int index,
                                      const Segment& segment, Shared& shared, Queries& q) {
    if constexpr (kConfig.queries_in_registers) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane() / 4 + 8 * half;
        const bool exists = row < segment.num_rows;
        const T* from = query_row(p, s, index, segment, exists ? row : 0);
#pragma unroll
        for (int i = 0; i < 2 * kDimSteps; ++i) {
          const int column = 8 * i + lane() % 4 * 2;
          q.held[i / 2][half + i % 2 * 2] =
              exists && column < p.head_dim ? *reinterpret_cast<const uint32_t*>(from + column) : 0;
        }
      }
    } else {
      for (int i = threadIdx.x; i < kRowTile * Tile::kChunks; i += kNumThreads) {
        const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
        const int column = chunk * Tile::kChunkElements;
        const bool exists = row < segment.num_rows && column < p.head_dim;
        *reinterpret_cast<uint4*>(shared.queries + Tile::offset(row, chunk)) =
            exists ? *reinterpret_cast<const uint4*>(query_row(p, s, index, segment, row) + column)
                   : uint4{};
      }
      __syncthreads();
      q.address = ptx::shared_address(shared.queries) + Tile::a_offset(lane());
    }
  }

  static __device__ RowRules rules_of(const Params& p, const Sequence& s, int index,
                                      const Segment& segment) {
    RowRules rules;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(lane() / 4 + 8 * half, segment.num_rows - 1);
      const int query = segment.query(row);
      const KeyRange keys = s.keys_of(p, query);
      rules.begin[half] = static_cast<int>(keys.begin);
      rules.end[half] = static_cast<int>(keys.end);
      rules.position[half] = s.num_keys - s.num_queries + query;
      rules.slope[half] =
          p.alibi_slopes == nullptr
              ? 0.0f
              : kLog2E * p.alibi_slopes[index * p.alibi_batch_stride + segment.head(row)];
    }
    return rules;
  }

  // ---- A segment's tiles ----

  // Attends num_tiles tiles from tile on; leaves o and the row statistics of each warp in
  // shared.merge.
  static __device__ void attend(const Merge& merge, int tile, int num_tiles, Shared& shared) {
    const Params& p = merge.p;
    const Sequence& s = merge.s;
    const int index = merge.index;
    const Segment& segment = merge.segment;
    Stage* stages = shared.stages[warp()];
    const int first_key = (s.begin / kTileKeys + tile) * kTileKeys;
    Loader loader(p, s, index, segment.kv_head, first_key);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      i < num_tiles ? loader.load(stages[i]) : ptx::cp_async_commit();
    }
    Queries q;
    load_queries(p, s, index, segment, shared, q);
    const RowRules rules = rules_of(p, s, index, segment);
    const bool has_rule = p.softcap > 0 || p.alibi_slopes != nullptr;
    float o[2 * kDimSteps][4] = {};
    float max[2] = {-INFINITY, -INFINITY};
    float sum[2] = {};
    int stage = 0;
    for (int i = 0; i < num_tiles; ++i) {
      ptx::cp_async_wait<kStages - 2>();
      __syncwarp();  // all lanes' copies are there, and nobody reads the stage before any more
      Stage& free = stages[stage == 0 ? kStages - 1 : stage - 1];
      i + kStages - 1 < num_tiles ? loader.load(free) : ptx::cp_async_commit();

      float scores[2][4] = {};
      multiply_keys(q, stages[stage].k, scores);
      const int key = first_key + i * kTileKeys + warp() * kWarpKeys;
      uint32_t weights[4];
      if (has_rule) {
        exponentiate<true>(p, scores, key, rules, max, sum, o, weights);
      } else {
        exponentiate<false>(p, scores, key, rules, max, sum, o, weights);
      }
      multiply_values(weights, stages[stage].v, o);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    merge.leave_warp(o, max, sum);
    __syncthreads();
  }

  static __device__ void multiply_keys(const Queries& q, const char* s_keys,
                                       float (&scores)[2][4]) {
    const uint32_t keys = ptx::shared_address(s_keys) + Tile::b_offset(lane());
#pragma unroll
    for (int step = 0; step < kDimSteps; ++step) {
      uint32_t a[4], b[4];
      q.fragment(step, a);
      ptx::ldmatrix_x4(b, Tile::advance(keys, 2 * step));
      MmaSm80::add<T>(scores[0], a, b[0], b[1]);
      MmaSm80::add<T>(scores[1], a, b[2], b[3]);
    }
  }
  static __device__ void multiply_values(const uint32_t (&weights)[4], const char* s_values,
                                         float (&o)[2 * kDimSteps][4]) {
    const uint32_t values = ptx::shared_address(s_values) + Tile::b_trans_offset(lane());
#pragma unroll
    for (int step = 0; step < kDimSteps; ++step) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, Tile::advance(values, 2 * step));
      MmaSm80::add<T>(o[2 * step], weights, b[0], b[1]);
      MmaSm80::add<T>(o[2 * step + 1], weights, b[2], b[3]);
    }
  }

  // From dot product to score in log2 units.
  static __device__ float score_of(const Params& p, float dot, int key, float slope, int position) {
    if (p.softcap > 0) {
      dot = p.softcap * tanhf(dot * p.softmax_scale / p.softcap) * kLog2E;
    } else {
      dot *= p.softmax_scale * kLog2E;
    }
    return dot - slope * fabsf(static_cast<float>(position - key));
  }

  // Online softmax over 16 keys; o is rescaled where a row's maximum grew.
  template <bool kScoreRule>
  static __device__ void exponentiate(const Params& p, float (&x)[2][4], int key,
                                      const RowRules& rules, float (&max)[2], float (&sum)[2],
                                      float (&o)[2 * kDimSteps][4], uint32_t (&weights)[4]) {
    const float scale = p.softmax_scale * kLog2E;
    float rescale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float row_max = max[half];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& score = x[e / 2][2 * half + e % 2];
        const int at = key + e / 2 * 8 + lane() % 4 * 2 + e % 2;
        const bool seen = at >= rules.begin[half] && at < rules.end[half];
        if constexpr (kScoreRule) {
          score = score_of(p, score, at, rules.slope[half], rules.position[half]);
        } else {
          score *= scale;
        }
        if (!seen) score = -INFINITY;
        row_max = fmaxf(row_max, score);
      }
      row_max = warp_reduce<Max, 4>(row_max);
      const float reference = finite_or_zero(row_max);
      rescale[half] = ptx::exp2_approx(max[half] - reference);
      max[half] = row_max;
      sum[half] *= rescale[half];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& score = x[e / 2][2 * half + e % 2];
        score = ptx::exp2_approx(score - reference);
        sum[half] += score;
      }
    }
    if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int t = 0; t < 2 * kDimSteps; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[t][e] *= rescale[e / 2];
      }
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      weights[2 * t] = pack_two(x[t][0], x[t][1], T{});
      weights[2 * t + 1] = pack_two(x[t][2], x[t][3], T{});
    }
  }
};

}  // namespace llamatelemetry::decode
