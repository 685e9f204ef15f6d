// out[i] = sum_j softmax_j(softmax_scale * q[i] . k[j]) v[j] for few queries a sequence over many
// keys, dense or in pages: bound by reading keys and values once. (Flash-Decoding: Dao et al. 2023)
//
// Query heads that share a key head, of all queries of a sequence, are the 16 rows of
// mma.m16n8k16. Each of four warps takes 16 keys of a tile of 64, through its own ring of stages
// filled by cp.async, with its own online softmax, so tiles need no barrier.
// Pages are looked up a tile ahead. Rows of keys and values that no query sees are never read.
// Grid: as many blocks as the GPU holds; plan.cuh says what each does.
#pragma once

#include "attention/decode/plan.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "ptx/sync.cuh"
#include "tile/convert.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/swizzled_tile.cuh"

namespace llamatelemetry::decode {

// A row tile of one key head of a sequence.
struct Segment {
  int kv_head, group_size;
  int first_row, num_rows;

  __device__ Segment(const AttentionParams& p, const Sequence& s, int which)
      : kv_head(which / s.row_tiles),
        group_size(static_cast<int>(p.group_size)),
        first_row(which % s.row_tiles * kRowTile),
        num_rows(min(kRowTile, s.num_queries * group_size - first_row)) {}
  __device__ int query(int row) const { return (first_row + row) / group_size; }
  __device__ int head(int row) const {
    return kv_head * group_size + (first_row + row) % group_size;
  }
};

// What two rows of a lane's fragments, group and group + 8, need beside their queries.
struct RowRules {
  int begin[2], end[2];  // keys they see
  float slope[2];        // ALiBi, in log2 units
  int position[2];       // among the keys
};

template <typename T, Config kConfig>
struct Decode {
  using Params = AttentionParams;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kStages = kConfig.stages;
  using Tile = SwizzledTile<kHeadDim>;
  static constexpr int kCapability = 80;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kMinBlocks = kConfig.blocks_per_sm;
  static constexpr int kDimSteps = kHeadDim / 16;
  static constexpr int kVector = 4;  // columns of a row that a thread merges at a time
  static constexpr int kRowVectors = kHeadDim / kVector;
  static constexpr int kItems = (kRowTile * kRowVectors + kNumThreads - 1) / kNumThreads;
  static constexpr int kLoadsAtOnce = 8;

  struct Stage {
    char k[Tile::bytes(kWarpKeys)];
    char v[Tile::bytes(kWarpKeys)];
  };
  struct Merge {  // row statistics: max in log2 units, and sum
    float o[kNumWarps][kRowTile][kHeadDim + 4];
    float2 stats[kNumWarps][kRowTile];
    float2 part_stats[kRowTile][kMaxPartsAtOnce];
  };
  struct alignas(128) Shared {
    union {
      Stage stages[kNumWarps][kStages];
      Merge merge;
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
    const Plan plan(p);
    const Runs runs(plan.total_tiles(), gridDim.x);
    const int block = blockIdx.x;
    if (block >= runs.num_runs) return;
    const int begin = runs.first_of(block);
    int end = runs.first_of(block + 1);
    if (begin >= end) return;
    // The pieces of a run in reverse: the one that later blocks wait for comes first, the one that
    // waits for earlier blocks last.
    int first_tile;  // of the sequence, among all tiles
    int index = plan.find(end - 1, &first_tile);
    while (true) {
      const Sequence sequence(p, index);
      while (end > begin && end > first_tile) {
        const int which = (end - 1 - first_tile) / sequence.tiles;
        const int segment_begin = first_tile + which * sequence.tiles;
        const int from = max(begin, segment_begin);
        const Segment segment(p, sequence, which);
        const int first_block = runs.block_of(segment_begin);
        const int last_block = runs.block_of(segment_begin + sequence.tiles - 1);
        attend(p, sequence, index, segment, from - segment_begin, end - from, shared);
        if (first_block == last_block) {
          finish(p, sequence, index, segment, shared.merge);
        } else if (block == last_block) {
          combine(p, sequence, index, segment, first_block, shared.merge);
        } else {
          leave_part(p, segment, shared.merge);
        }
        __syncthreads();  // the stages are free again
        end = from;
      }
      if (end == begin) return;
      do {
        --index;
        first_tile -= Sequence(p, index).work(p);
      } while (first_tile == end);
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
  static __device__ void attend(const Params& p, const Sequence& s, int index,
                                const Segment& segment, int tile, int num_tiles, Shared& shared) {
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
    leave_warp(segment, o, max, sum, shared.merge);
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
  // Of a row that has seen no key yet the maximum is -infinity, and so are its scores.
  static __device__ float finite_or_zero(float row_max) {
    return row_max == -INFINITY ? 0.0f : row_max;
  }

  // ---- Merging warps and parts ----

  // Four columns of a row: o, not yet divided by the sum of the weights; the row's statistics.
  struct Partial {
    float4 o{};
    float max = -INFINITY;
    float sum = 0;

    // Adds another's that is exponentiated against its own maximum; max covers both already.
    __device__ void add(const float4& other_o, float other_max, float other_sum) {
      const float factor = ptx::exp2_approx(other_max - finite_or_zero(max));
      o.x += other_o.x * factor;
      o.y += other_o.y * factor;
      o.z += other_o.z * factor;
      o.w += other_o.w * factor;
      sum += other_sum * factor;
    }
  };

  static __device__ void leave_warp(const Segment& segment, const float (&o)[2 * kDimSteps][4],
                                    const float (&max)[2], const float (&sum)[2], Merge& merge) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane() / 4 + 8 * half;
      const float row_sum = warp_reduce<Sum, 4>(sum[half]);
      if (row >= segment.num_rows) continue;
      float* to = merge.o[warp()][row] + lane() % 4 * 2;
#pragma unroll
      for (int t = 0; t < 2 * kDimSteps; ++t) {
        *reinterpret_cast<float2*>(to + 8 * t) = {o[t][2 * half], o[t][2 * half + 1]};
      }
      merge.stats[warp()][row] = {max[half], row_sum};
    }
  }

  static __device__ Partial merged(const Merge& merge, int row, int column) {
    Partial all;
#pragma unroll
    for (int w = 0; w < kNumWarps; ++w) all.max = fmaxf(all.max, merge.stats[w][row].x);
#pragma unroll
    for (int w = 0; w < kNumWarps; ++w) {
      all.add(*reinterpret_cast<const float4*>(&merge.o[w][row][column]), merge.stats[w][row].x,
              merge.stats[w][row].y);
    }
    return all;
  }

  // Calls body(row, column) for this thread's vectors of the segment's rows.
  template <typename Body>
  static __device__ void for_each_vector(const Segment& segment, Body&& body) {
    for (int i = threadIdx.x; i < segment.num_rows * kRowVectors; i += kNumThreads) {
      body(i / kRowVectors, i % kRowVectors * kVector);
    }
  }

  static __device__ void finish(const Params& p, const Sequence& s, int index,
                                const Segment& segment, const Merge& merge) {
    for_each_vector(segment, [&](int row, int column) {
      write(p, s, index, segment, row, column, merged(merge, row, column));
    });
  }

  static __device__ void write(const Params& p, const Sequence& s, int index,
                               const Segment& segment, int row, int column, Partial x) {
    const int head = segment.head(row);
    float factor = 1;
    if (p.sinks != nullptr) {
      const float sink = p.sinks[head] * kLog2E;
      const float row_max = fmaxf(x.max, sink);
      factor = ptx::exp2_approx(x.max - finite_or_zero(row_max));
      x.sum = x.sum * factor + ptx::exp2_approx(sink - finite_or_zero(row_max));
      x.max = row_max;
    }
    factor = x.sum == 0 ? 0.0f : factor / x.sum;
    const bool packed = p.cu_seqlens_q != nullptr;
    const int64_t query = s.first_query + segment.query(row);
    const int64_t token = packed ? query : index * p.seqlen_q + query;
    if (column < p.head_dim) {
      T* out = static_cast<T*>(p.out) + (token * p.num_heads_q + head) * p.head_dim + column;
      *reinterpret_cast<uint2*>(out) = {pack_two(x.o.x * factor, x.o.y * factor, T{}),
                                        pack_two(x.o.z * factor, x.o.w * factor, T{})};
    }
    if (column == 0) {
      const int64_t at =
          packed ? head * p.total_q + token : (index * p.num_heads_q + head) * p.seqlen_q + query;
      p.lse[at] = x.sum == 0 ? -INFINITY : (x.max + log2f(x.sum)) * kLn2;
    }
  }

  // A block leaves at most one part, its number: of the segment that its run ends in but does not
  // end.
  static __device__ void leave_part(const Params& p, const Segment& segment, const Merge& merge) {
    const int part = blockIdx.x;
    for_each_vector(segment, [&](int row, int column) {
      const Partial x = merged(merge, row, column);
      const int64_t at = int64_t{part} * kRowTile + row;
      __stcg(reinterpret_cast<float4*>(p.partial_out + at * kHeadDim + column), x.o);
      if (column == 0) __stcg(reinterpret_cast<float2*>(p.partial_stats) + at, {x.max, x.sum});
    });
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ptx::store_release(p.part_flags + part, p.launch_number);
  }

  // The last block of a segment adds the parts of the blocks before it, in their order, and its
  // own. It waits for them; they wait for nobody before they leave theirs. That they have started
  // is so where blocks start in the order of their index, as they do on every GPU so far; where
  // all blocks fit the GPU at once, as the grid is chosen, the order does not matter.
  static __device__ void combine(const Params& p, const Sequence& s, int index,
                                 const Segment& segment, int first_block, Merge& merge) {
    const int num_parts = static_cast<int>(blockIdx.x) - first_block;
#pragma unroll 1
    for (int item = 0; item < kItems; ++item) {
      const int i = threadIdx.x + item * kNumThreads;
      const int row = i / kRowVectors, column = i % kRowVectors * kVector;
      Partial all;
#pragma unroll 1
      for (int begin = 0; begin < num_parts; begin += kMaxPartsAtOnce) {
        const int count = min(kMaxPartsAtOnce, num_parts - begin);
        if (item == 0 || num_parts > kMaxPartsAtOnce) {
          gather_stats(p, segment, first_block + begin, count, merge);
        }
        if (row < segment.num_rows) {
          add_parts(p, merge.part_stats[row], first_block + begin, count, row, column, all);
        }
      }
      if (row < segment.num_rows) {
        const Partial own = merged(merge, row, column);
        Partial x;
        x.max = fmaxf(all.max, own.max);
        x.add(all.o, all.max, all.sum);
        x.add(own.o, own.max, own.sum);
        write(p, s, index, segment, row, column, x);
      }
    }
    // For a graph's next replay, which comes with the same number.
    __syncthreads();
    for (int i = threadIdx.x; i < num_parts; i += kNumThreads) {
      p.part_flags[first_block + i] = 0;
    }
  }

  // Waits for parts and takes their statistics. A flag is there when it carries this launch's
  // number: the workspace holds anything at first.
  static __device__ void gather_stats(const Params& p, const Segment& segment, int begin, int count,
                                      Merge& merge) {
    __syncthreads();  // the statistics before are read
    for (int i = threadIdx.x; i < count * segment.num_rows; i += kNumThreads) {
      const int part = begin + i % count, row = i / count;
      while (ptx::load_acquire(p.part_flags + part) != p.launch_number) {
      }
      const auto* stats = reinterpret_cast<const float2*>(p.partial_stats);
      merge.part_stats[row][i % count] = __ldcg(stats + part * kRowTile + row);
    }
    __syncthreads();
  }

  static __device__ void add_parts(const Params& p, const float2 (&stats)[kMaxPartsAtOnce],
                                   int begin, int count, int row, int column, Partial& all) {
    Partial x;
    x.max = all.max;
    for (int i = 0; i < count; ++i) x.max = fmaxf(x.max, stats[i].x);
    x.add(all.o, all.max, all.sum);
#pragma unroll 1
    for (int first = 0; first < count; first += kLoadsAtOnce) {
      float4 o[kLoadsAtOnce];
#pragma unroll
      for (int i = 0; i < kLoadsAtOnce; ++i) {
        const int block = begin + first + i;
        const int64_t at = int64_t{block} * kRowTile + row;
        if (first + i < count) {
          o[i] = __ldcg(reinterpret_cast<const float4*>(p.partial_out + at * kHeadDim + column));
        }
      }
#pragma unroll
      for (int i = 0; i < kLoadsAtOnce; ++i) {
        if (first + i < count) x.add(o[i], stats[first + i].x, stats[first + i].y);
      }
    }
    all = x;
  }
};

}  // namespace llamatelemetry::decode
