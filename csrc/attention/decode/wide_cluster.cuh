// Decode attention of a few sequences on Hopper, for up to 64 rows of a key head: a cluster of
// blocks takes each key head of a sequence, a part of the keys each, multiplied as in
// warpgroup.cuh. As in cluster.cuh nothing is handed on through memory: each block adds up some
// rows of all parts, which the others copy into its shared memory. A part is 32 KB,
// of which cluster.cuh would make 2048 stores, each counted by a barrier.
//
// Grid [blocks of a cluster, key heads, sequences], clusters along x. Without softcap and ALiBi.
#pragma once

#include "attention/decode/cluster.cuh"
#include "attention/decode/warpgroup.cuh"

namespace llamatelemetry::decode {

// kStages: tiles of a warpgroup in shared memory.
template <typename T, Config kConfig, int kStages>
struct WideClusterDecode {
  using Params = AttentionParams;
  using Warpgroup = WarpgroupDecode<T, kConfig>;
  using Tile = typename Warpgroup::Tile;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kCapability = 90;
  // Take turns in the block's tiles: a chain of products and exponentials of one is longer than
  // what memory takes for a tile.
  static constexpr int kGroups = 2;
  static constexpr int kGroupThreads = Warpgroup::kNumThreads;
  static constexpr int kNumThreads = kGroups * kGroupThreads;
  static constexpr int kMinBlocks = 1;
  static constexpr int kRows = kWideRowTile;
  static constexpr int kVector = 4;  // columns of a row that a thread adds up at a time
  static constexpr int kRowVectors = kHeadDim / kVector;
  using KeysLoader = Loader<Tile, kGroups * kTileKeys>;

  struct Group {
    static constexpr int kKeysApart = kGroups * kTileKeys;
    static __device__ int index() { return static_cast<int>(threadIdx.x) / kGroupThreads; }
    static __device__ int warp() {
      return static_cast<int>(threadIdx.x) % kGroupThreads / kWarpSize;
    }
    static __device__ void sync() { ptx::named_barrier_sync(1 + index(), kGroupThreads); }
  };

  struct KeysAndValues {
    char k[Tile::kBytes], v[Tile::kBytes];
  };
  struct Row {
    float o[kHeadDim];
    float max, sum;  // max in log2 units
    float unused[2];
  };
  struct alignas(1024) Shared {
    union {
      KeysAndValues tiles[kGroups][kStages];
      struct {
        Row of_groups[kGroups][kRows];
        Row own[kRows];
      };
    };
    char queries[Tile::kBytes];
    // Copied here by all blocks of the cluster: this block's rows of each part, never more than
    // kRows. `pushed` counts the bytes.
    Row parts[kRows];
    alignas(8) uint64_t pushed;
  };
  static constexpr int kSharedBytes = sizeof(Shared);

  // Rows of this cluster: those of a sequence's key head.
  struct Rows {
    int count;
    int group_size;
    __device__ int query(int row) const { return row / group_size; }
    __device__ int head(int row) const {
      return static_cast<int>(blockIdx.y) * group_size + row % group_size;
    }
    // Rows with the same row >> shift are one block's.
    __device__ int shift() const {
      const int blocks = static_cast<int>(gridDim.x);
      return 32 - __clz((count - 1) >> (31 - __clz(blocks)));
    }
  };
  struct RowRange {
    int begin, end;
  };
  static __device__ RowRange rows_of_block(const Rows& rows) {
    const int first = static_cast<int>(blockIdx.x) << rows.shift();
    return {min(first, rows.count), min(rows.count, first + (1 << rows.shift()))};
  }

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(1024) char s_tiles[];
    Shared& shared = *reinterpret_cast<Shared*>(s_tiles);
    let_successors_start();
    const auto index = static_cast<int>(blockIdx.z);
    SequenceCounts counts = SequenceCounts::read(p, index);
    ClusterShare share;
    KeysLoader loader;
    bool is_guess = true;
    while (true) {
      share = ClusterShare(p, counts);
      loader = KeysLoader(p, index, static_cast<int>(blockIdx.y), 0, share.first_key,
                          {.begin = share.begin, .end = share.keys_end});
      if (is_guess) {
        loader.prefetch(p.num_pages);
        wait_for_predecessors();
        is_guess = false;
      }
      loader.find_page();  // beside the counts, not after them
      const SequenceCounts now = SequenceCounts::read(p, index);
      if (now == counts) break;
      counts = now;
    }
    const auto group_size = static_cast<int>(p.group_size);
    const Rows rows{.count = counts.num_queries * group_size, .group_size = group_size};
    if (rows.count == 0) return;  // and so do all blocks of the cluster
    expect_parts(share, rows, shared);
    __syncwarp();
    ptx::cluster_arrive();
    attend(p, counts, share, rows, loader, shared);
    merge_groups(rows, shared);
    ptx::cluster_wait();  // the other blocks expect parts
    push(share, rows, shared);
    add_up(p, counts, share, rows, shared);
    ptx::cluster_wait();  // what this block has pushed is there
  }

  // This block's keys; leaves the rows of each warpgroup.
  static __device__ void attend(const Params& p, const SequenceCounts& counts,
                                const ClusterShare& share, const Rows& rows, KeysLoader& loader,
                                Shared& shared) {
    const int lane = threadIdx.x % kWarpSize;
    const int first_row = Group::warp() * kRowTile;
    const int group = Group::index();
    const auto query_of = [&](int row) {
      return row < rows.count ? static_cast<const T*>(p.q.data) + blockIdx.z * p.q.batch_stride +
                                    (counts.first_query + rows.query(row)) * p.q.token_stride +
                                    rows.head(row) * p.q.head_stride
                              : nullptr;
    };
    const auto rules_of = [&] {
      RowRules rules{};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = rows.query(min(first_row + lane / 4 + 8 * half, rows.count - 1));
        rules.begin[half] = share.first_seen(query);
        rules.end[half] = share.end_seen(query);
      }
      return rules;
    };
    const auto seen_of = [&]() -> KeysRead {
      return {share.first_seen(counts.num_queries - 1), min(share.end_seen(0), share.keys_end)};
    };
    RowStats stats;
    float o[kHeadDim / 2] = {};
    Warpgroup::template attend_keys<Group>(
        p, loader, share.first_key + group * kTileKeys,
        (share.num_tiles + kGroups - 1 - group) / kGroups, shared.tiles[group], shared.queries,
        [&] {
          Warpgroup::template load_queries<kNumThreads>(static_cast<int>(p.head_dim), query_of,
                                                        shared.queries);
          ptx::fence_proxy_async_shared();
          __syncthreads();
        },
        rules_of, seen_of, stats, o);
    __syncthreads();  // nor does the other group read its tiles
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane / 4 + 8 * half;
      const float sum = quad_reduce<Sum>(stats.sum[half]);
      if (row >= rows.count) continue;
      Row& to = shared.of_groups[group][row];
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(&to.o[8 * j + lane % 4 * 2]) = {o[4 * j + 2 * half],
                                                                   o[4 * j + 2 * half + 1]};
      }
      if (lane % 4 == 0) {
        to.max = stats.max[half];
        to.sum = sum;
      }
    }
    __syncthreads();
  }

  // The rows of this block from those of its warpgroups, as the copy engine may read them.
  static __device__ void merge_groups(const Rows& rows, Shared& shared) {
    for (int i = threadIdx.x; i < rows.count * kRowVectors; i += kNumThreads) {
      const int row = i / kRowVectors, column = i % kRowVectors * kVector;
      Partial x;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        x.max = fmaxf(x.max, shared.of_groups[group][row].max);
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const Row& from = shared.of_groups[group][row];
        x.add(*reinterpret_cast<const float4*>(&from.o[column]), from.max, from.sum);
      }
      *reinterpret_cast<float4*>(&shared.own[row].o[column]) = x.o;
      if (column == 0) {
        *reinterpret_cast<float4*>(&shared.own[row].max) = {x.max, x.sum, 0, 0};
      }
    }
    ptx::fence_proxy_async_shared();
    __syncthreads();
  }

  // ---- Parts ----

  static __device__ void expect_parts(const ClusterShare& share, const Rows& rows, Shared& shared) {
    if (threadIdx.x != 0) return;
    const RowRange own = rows_of_block(rows);
    if (own.begin >= own.end) return;  // nor does anybody wait: add_up
    const uint32_t barrier = ptx::shared_address(&shared.pushed);
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(
        barrier, static_cast<uint32_t>((own.end - own.begin) * share.num_parts * sizeof(Row)));
  }

  // A copy to each block that adds rows up.
  static __device__ void push(const ClusterShare& share, const Rows& rows, Shared& shared) {
    const auto rank = static_cast<int>(blockIdx.x), to = static_cast<int>(threadIdx.x);
    const int shift = rows.shift();
    const int first = to << shift;
    if (to >= static_cast<int>(gridDim.x) || rank >= share.num_parts || first >= rows.count) return;
    const auto there = [&](const void* here) {
      return ptx::cluster_address(ptx::shared_address(here), static_cast<uint32_t>(to));
    };
    const int count = min(1 << shift, rows.count - first);
    ptx::copy_to_cluster(there(&shared.parts[rank << shift]),
                         ptx::shared_address(&shared.own[first]),
                         static_cast<uint32_t>(count * sizeof(Row)), there(&shared.pushed));
  }

  // This block's rows of all parts, in the parts' order.
  static __device__ void add_up(const Params& p, const SequenceCounts& counts,
                                const ClusterShare& share, const Rows& rows, const Shared& shared) {
    const RowRange own = rows_of_block(rows);
    const int shift = rows.shift();
    if (own.begin < own.end) ptx::mbarrier_wait(ptx::shared_address(&shared.pushed), 0);
    __syncwarp();
    ptx::cluster_arrive();  // nobody needs to stay for this block's sake
    for (int i = threadIdx.x; i < (own.end - own.begin) * kRowVectors; i += kNumThreads) {
      const int at = i / kRowVectors, column = i % kRowVectors * kVector;
      Partial x;
#pragma unroll 4
      for (int part = 0; part < share.num_parts; ++part) {
        x.max = fmaxf(x.max, shared.parts[(part << shift) + at].max);
      }
#pragma unroll 4
      for (int part = 0; part < share.num_parts; ++part) {
        const int slot = (part << shift) + at;
        x.add(*reinterpret_cast<const float4*>(&shared.parts[slot].o[column]),
              shared.parts[slot].max, shared.parts[slot].sum);
      }
      const int query = rows.query(own.begin + at), head = rows.head(own.begin + at);
      const int64_t index = blockIdx.z;
      const bool is_packed = p.cu_seqlens_q != nullptr;
      const int64_t token = is_packed ? counts.first_query + query : index * p.seqlen_q + query;
      const int64_t lse_at = is_packed ? head * p.total_q + token
                                       : (index * p.num_heads_q + head) * p.seqlen_q + query;
      write_result<T>(p, x, head, token, lse_at, column);
    }
  }
};

}  // namespace llamatelemetry::decode
