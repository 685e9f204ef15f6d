// Decode attention of one sequence on Hopper: a cluster of blocks takes each
// row tile of a key head, a part of the keys each, and adds the parts up in
// shared memory. So nothing is handed on through memory, and a plan is a few
// instructions: one sequence is short, and what counts are the steps that wait
// for each other.
//
// Each block adds up some columns of all parts. The others push theirs into its
// shared memory. Grid [blocks of a cluster, key heads, row tiles], clusters
// along x, kNumWarps * 32 threads. Without softcap and ALiBi, which decode.cuh
// serves.
#pragma once

#include "attention/decode/decode.cuh"
#include "ptx/cluster.cuh"
#include "ptx/tma.cuh"

namespace llamatelemetry::decode {

// What memory says of a sequence. Read past L1, so that it can be read as a
// guess before what writes it has ended.
struct SequenceCounts {
  int first_query, num_queries, num_keys;

  static __device__ SequenceCounts read(const AttentionParams& p, int index) {
    const int most = static_cast<int>(p.seqlen_q);
    if (p.cu_seqlens_q == nullptr) return {0, most, static_cast<int>(p.seqlen_k)};
    const int first = __ldcg(p.cu_seqlens_q + index);
    const int count = __ldcg(p.cu_seqlens_q + index + 1) - first;
    return {first, max(0, min(count, most)), max(0, __ldcg(p.cache_seqlens + index))};
  }
  __device__ bool operator==(const SequenceCounts& other) const {
    return first_query == other.first_query && num_queries == other.num_queries &&
           num_keys == other.num_keys;
  }
};

// The keys of a query, and what a block has of them.
struct ClusterShare {
  int shown;                           // keys that the table holds
  int left, right;                     // the window, -1: unlimited
  int first_position;                  // of the first query, among the keys
  int begin;                           // the first key that any query sees
  int first_key, num_tiles, keys_end;  // this block's
  int num_parts;                       // blocks of the cluster that have keys; at least 1

  static __device__ int within_reach(int64_t side) {
    constexpr int kFar = 1 << 30;
    return side < 0 || side > kFar ? -1 : static_cast<int>(side);
  }
  ClusterShare() = default;
  __device__ ClusterShare(const AttentionParams& p, const SequenceCounts& counts)
      : shown(min(counts.num_keys, static_cast<int>(p.seqlen_k))),
        left(within_reach(p.window_left)),
        right(within_reach(p.window_right)),
        first_position(counts.num_keys - counts.num_queries) {
    begin = min(first_seen(0), shown);
    const int first_tile = begin / kTileKeys;
    const int tiles = (shown + kTileKeys - 1) / kTileKeys - first_tile;
    const int rank = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const int shift = 31 - __clz(blocks);
    const int quotient = tiles >> shift, remainder = tiles & (blocks - 1);
    first_key = (first_tile + rank * quotient + min(rank, remainder)) * kTileKeys;
    num_tiles = quotient + (rank < remainder ? 1 : 0);
    keys_end = min(shown, first_key + num_tiles * kTileKeys);
    num_parts = max(1, min(blocks, tiles));
  }
  __device__ int first_seen(int query) const {
    const int position = first_position + query;
    return left >= 0 && position > left ? position - left : 0;
  }
  __device__ int end_seen(int query) const {
    const int position = first_position + query;
    return right >= 0 && right < shown - position ? position + right + 1 : shown;
  }
};

template <typename T, Config kConfig>
struct ClusterDecode {
  using Params = AttentionParams;
  using Base = Decode<T, kConfig, false>;
  using Keys = typename Base::Keys;
  using Stage = typename Base::Stage;
  using At = typename Base::At;
  using Scales = typename Base::Scales;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kCapability = 90;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kMinBlocks = 1;
  static constexpr int kVector = 4;  // columns of a row that a thread merges at a time
  static constexpr int kRowVectors = kHeadDim / kVector;
  static constexpr int kSlots = kConfig.cluster_slots();
  static_assert(!kConfig.is_wide());

  struct alignas(128) Shared {
    union {
      Stage stages[kNumWarps][kStages];
      struct {
        float o[kNumWarps][kRowTile][kHeadDim + 4];
        float2 stats[kNumWarps][kRowTile];  // maximum in log2 units, and sum
      } warps;
    };
    alignas(16) char queries[std::max(1, kConfig.query_bytes())];
    // Pushed by all blocks of the cluster; `pushed` counts the bytes.
    float4 o[kSlots];
    float2 stats[kSlots];
    alignas(8) uint64_t pushed;
  };
  static constexpr int kSharedBytes = sizeof(Shared);

  // Rows of this cluster.
  struct Rows {
    int first, count;
    int group_size, num_queries_at_most;
    __device__ int query(int row) const {
      return num_queries_at_most == 1 ? 0
                                      : static_cast<int>(static_cast<unsigned>(first + row) /
                                                         static_cast<unsigned>(group_size));
    }
    __device__ int head(int row) const {
      return static_cast<int>(blockIdx.y) * group_size + first + row - query(row) * group_size;
    }
  };

  static __device__ int warp() { return threadIdx.x / kWarpSize; }
  static __device__ int lane() { return threadIdx.x % kWarpSize; }

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(128) char s_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(s_bytes);
    let_successors_start();
    SequenceCounts counts = SequenceCounts::read(p, 0);
    ClusterShare share;
    Loader<Keys> loader;
    bool is_guess = true;
    while (true) {
      share = ClusterShare(p, counts);
      loader = Loader<Keys>(p, 0, static_cast<int>(blockIdx.y), 0, share.first_key,
                            {.begin = share.begin, .end = share.keys_end});
      if (is_guess) {
        loader.prefetch(p.num_pages);
        wait_for_predecessors();
        is_guess = false;
      }
      loader.find_page();  // beside the counts, not after them
      const SequenceCounts now = SequenceCounts::read(p, 0);
      if (now == counts) break;
      counts = now;
    }
    Rows rows{.first = static_cast<int>(blockIdx.z) * kRowTile,
              .group_size = static_cast<int>(p.group_size),
              .num_queries_at_most = static_cast<int>(p.seqlen_q)};
    rows.count = min(kRowTile, counts.num_queries * rows.group_size - rows.first);
    if (rows.count <= 0) return;  // and so do all blocks of the cluster
    expect_parts(share, rows, shared);
    __syncwarp();
    ptx::cluster_arrive();
    attend(p, counts, share, rows, loader, shared);
    ptx::cluster_wait();  // the other blocks expect parts
    push(share, rows, shared);
    add_up(p, counts, share, rows, shared);
  }

  // This block's keys; leaves o and row statistics of each warp.
  static __device__ void attend(const Params& p, const SequenceCounts& counts,
                                const ClusterShare& share, const Rows& rows, Loader<Keys>& loader,
                                Shared& shared) {
    Stage* stages = shared.stages[warp()];
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      i < share.num_tiles ? loader.load(stages[i]) : ptx::cp_async_commit();
    }
    typename Keys::Queries q;
    Keys::load_queries(
        [&](int row) {
          return row < rows.count ? static_cast<const T*>(p.q.data) +
                                        (counts.first_query + rows.query(row)) * p.q.token_stride +
                                        rows.head(row) * p.q.head_stride
                                  : nullptr;
        },
        static_cast<int>(p.head_dim), shared.queries, q);
    RowRules rules{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = rows.query(min(lane() / 4 + 8 * half, rows.count - 1));
      rules.begin[half] = share.first_seen(query);
      rules.end[half] = share.end_seen(query);
    }
    float o[2 * Base::kDimSteps][4] = {};
    RowStats stats;
    int stage = 0;
    for (int i = 0; i < share.num_tiles; ++i) {
      ptx::cp_async_wait<kStages - 1>();
      __syncwarp();  // all lanes' copies are there
      const At at[1] = {{&stages[stage], share.first_key + i * kTileKeys + warp() * kWarpKeys}};
      float scores[1][2][4] = {};
      const Scales scales[1] = {Keys::multiply_keys(q, *at[0].stage, scores[0])};
      Base::template exponentiate<false>(p, scores, at, rules, scales, stats, o);
      Keys::multiply_values(scores[0], *at[0].stage, o);
      __syncwarp();  // nobody reads the stage any more
      i + kStages < share.num_tiles ? loader.load(stages[stage]) : ptx::cp_async_commit();
      stage = Base::wrapped(stage + 1);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    Base::to_reference_of_sums(stats, o);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane() / 4 + 8 * half;
      const float sum = warp_reduce<Sum, 4>(stats.sum[half]);
      if (row >= rows.count) continue;
      Keys::store_row(o, half, shared.warps.o[warp()][row]);
      shared.warps.stats[warp()][row] = {stats.max[half], sum};
    }
    __syncthreads();
  }

  // ---- Parts ----

  // Vectors i of the rows' columns with the same i >> shift are one block's.
  static __device__ int share_shift(const Rows& rows) {
    const int blocks = static_cast<int>(gridDim.x);
    return 32 - __clz((rows.count * kRowVectors - 1) >> (31 - __clz(blocks)));
  }

  struct Vectors {
    int begin, end;
  };
  static __device__ Vectors vectors_of_block(const Rows& rows) {
    const int shift = share_shift(rows);
    const int first = static_cast<int>(blockIdx.x) << shift;
    return {first, min(rows.count * kRowVectors, first + (1 << shift))};
  }

  static __device__ void expect_parts(const ClusterShare& share, const Rows& rows, Shared& shared) {
    if (threadIdx.x != 0) return;
    const Vectors own = vectors_of_block(rows);
    if (own.begin >= own.end) return;  // nor does anybody wait: add_up
    const int bytes =
        (own.end - own.begin) * share.num_parts * static_cast<int>(sizeof(float4) + sizeof(float2));
    const uint32_t barrier = ptx::shared_address(&shared.pushed);
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier, static_cast<uint32_t>(bytes));
  }

  static __device__ void push(const ClusterShare& share, const Rows& rows, Shared& shared) {
    const int rank = static_cast<int>(blockIdx.x);
    if (rank >= share.num_parts) return;
    const int shift = share_shift(rows);
    for (int i = threadIdx.x; i < rows.count * kRowVectors; i += kNumThreads) {
      const int row = i / kRowVectors, column = i % kRowVectors * kVector;
      Partial x;
#pragma unroll
      for (int w = 0; w < kNumWarps; ++w) x.max = fmaxf(x.max, shared.warps.stats[w][row].x);
#pragma unroll
      for (int w = 0; w < kNumWarps; ++w) {
        const float2 of_warp = shared.warps.stats[w][row];
        x.add(*reinterpret_cast<const float4*>(&shared.warps.o[w][row][column]), of_warp.x,
              of_warp.y);
      }
      const int slot = (rank << shift) + (i & ((1 << shift) - 1));
      const auto to = static_cast<uint32_t>(i >> shift);
      const auto there = [&](const void* here) {
        return ptx::cluster_address(ptx::shared_address(here), to);
      };
      const uint32_t barrier = there(&shared.pushed);
      ptx::push_cluster(there(&shared.o[slot]), x.o, barrier);
      ptx::push_cluster(there(&shared.stats[slot]), float2{x.max, x.sum}, barrier);
    }
  }

  // This block's columns of all parts, in the parts' order.
  static __device__ void add_up(const Params& p, const SequenceCounts& counts,
                                const ClusterShare& share, const Rows& rows, const Shared& shared) {
    const int shift = share_shift(rows);
    const auto [first, end] = vectors_of_block(rows);
    if (first >= end) return;
    ptx::mbarrier_wait(ptx::shared_address(&shared.pushed), 0);
    for (int i = first + static_cast<int>(threadIdx.x); i < end; i += kNumThreads) {
      Partial x;
#pragma unroll 4
      for (int part = 0; part < share.num_parts; ++part) {
        x.max = fmaxf(x.max, shared.stats[(part << shift) + i - first].x);
      }
#pragma unroll 4
      for (int part = 0; part < share.num_parts; ++part) {
        const int slot = (part << shift) + i - first;
        x.add(shared.o[slot], shared.stats[slot].x, shared.stats[slot].y);
      }
      const int row = i / kRowVectors;
      const int query = rows.query(row), head = rows.head(row);
      const int64_t token = counts.first_query + query;
      const int64_t lse_at =
          p.cu_seqlens_q != nullptr ? head * p.total_q + token : head * p.seqlen_q + token;
      write_result<T>(p, x, head, token, lse_at, i % kRowVectors * kVector);
    }
  }
};

}  // namespace llamatelemetry::decode
