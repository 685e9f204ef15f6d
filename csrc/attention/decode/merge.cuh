// From the accumulators of warps to results: warps merged, parts of segments left and combined.
#pragma once

#include "attention/decode/plan.cuh"
#include "ptx/math.cuh"
#include "ptx/sync.cuh"
#include "tile/convert.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry::decode {

// A row tile of one key head of a sequence.
struct Segment {
  int kv_head, group_size;
  int first_row, num_rows;

  template <bool kFixed, int kRows>
  __device__ Segment(const AttentionParams& p, const Sequence<kFixed, kRows>& s, int which,
                     int num_lanes, int lane)
      : kv_head(which / s.row_tiles * num_lanes + lane),
        group_size(static_cast<int>(p.group_size)),
        first_row(which % s.row_tiles * kRows),
        num_rows(min(kRows, s.num_queries * group_size - first_row)) {}
  __device__ int query(int row) const { return (first_row + row) / group_size; }
  __device__ int head(int row) const {
    return kv_head * group_size + (first_row + row) % group_size;
  }
};

// Of a row that has seen no key yet the maximum is -infinity, and so are its scores.
__device__ inline float finite_or_zero(float row_max) {
  return row_max == -INFINITY ? 0.0f : row_max;
}

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

// The result from `column` of a token's head on, and with the first column its lse.
template <typename T>
__device__ void write_result(const AttentionParams& p, Partial x, int head, int64_t token,
                             int64_t lse_at, int column) {
  float factor = 1;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[head] * kLog2E;
    const float row_max = fmaxf(x.max, sink);
    factor = ptx::exp2_approx(x.max - finite_or_zero(row_max));
    x.sum = x.sum * factor + ptx::exp2_approx(sink - finite_or_zero(row_max));
    x.max = row_max;
  }
  factor = x.sum == 0 ? 0.0f : factor / x.sum;
  if (column < p.head_dim) {
    T* out = static_cast<T*>(p.out) + (token * p.num_heads_q + head) * p.head_dim + column;
    *reinterpret_cast<uint2*>(out) = {pack_two(x.o.x * factor, x.o.y * factor, T{}),
                                      pack_two(x.o.z * factor, x.o.w * factor, T{})};
  }
  if (column == 0) p.lse[lse_at] = x.sum == 0 ? -INFINITY : (x.max + log2f(x.sum)) * kLn2;
}

// kFixed: whether segments are cut where the caller says. Then each part stands in memory by itself
// and all are added in their order, whichever blocks they came from. Else a block adds up what it
// has of a segment, and leaves at most one part: of the segment that its run ends in.
template <typename T, Config kConfig, bool kFixed>
struct Merging {
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kDimSteps = kHeadDim / 16;
  static constexpr int kVector = 4;  // columns of a row that a thread merges at a time
  static constexpr int kRowVectors = kHeadDim / kVector;
  static constexpr int kRows = kConfig.row_tile;
  static constexpr int kItems = (kRows * kRowVectors + kNumThreads - 1) / kNumThreads;
  static constexpr int kLoadsAtOnce = 8;

  static constexpr bool kAddsWarps = kConfig.merge_slots() < kNumWarps;  // before they are merged

  struct Shared {  // row statistics: max in log2 units, and sum
    float o[kConfig.merge_slots()][kRowTile][kHeadDim + 4];
    float2 stats[kNumWarps][kRowTile];
    float2 part_stats[kRows][kMaxPartsAtOnce];
  };

  const AttentionParams& p;
  const Sequence<kFixed, kRows>& s;
  const int index;  // of the sequence
  const Segment& segment;
  Shared& shared;
  const int block_step;  // from a block of the segment to the next

  static __device__ int warp() { return threadIdx.x / kWarpSize; }
  static __device__ int lane() { return threadIdx.x % kWarpSize; }

  // In a wide tile each warp has rows of its own.
  static __device__ int first_row_of_warp() { return kConfig.is_wide() ? warp() * kRowTile : 0; }

  // A warp's share of the tiles attended. Keys: keys_16_bit.cuh's or keys_8_bit.cuh's.
  template <typename Keys>
  __device__ void leave_warp(const float (&o)[2 * kDimSteps][4], const float (&max)[2],
                             const float (&sum)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane() / 4 + 8 * half;
      const float row_sum = warp_reduce<Sum, 4>(sum[half]);
      if (first_row_of_warp() + row >= segment.num_rows) continue;
      if constexpr (!kAddsWarps) Keys::store_row(o, half, shared.o[warp()][row]);
      shared.stats[warp()][row] = {max[half], row_sum};
    }
    if constexpr (kAddsWarps) add_warps<Keys>(o, max);
  }

  // Where there is room for the o of one warp: each in its turn adds its own, exponentiated against
  // the maximum of all. Their statistics are there.
  template <typename Keys>
  __device__ void add_warps(const float (&o)[2 * kDimSteps][4], const float (&max)[2]) const {
    for_each_vector([&](int row, int column) {
      *reinterpret_cast<float4*>(&shared.o[0][row][column]) = float4{};
    });
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < kNumWarps; ++w) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane() / 4 + 8 * half;
        if (w != warp() || row >= segment.num_rows) continue;
        const float factor = ptx::exp2_approx(max[half] - finite_or_zero(max_of_warps(row)));
        Keys::add_row(o, half, factor, shared.o[0][row]);
      }
      if (w + 1 < kNumWarps) __syncthreads();
    }
  }
  __device__ float max_of_warps(int row) const {
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kNumWarps; ++w) largest = fmaxf(largest, shared.stats[w][row].x);
    return largest;
  }

  __device__ Partial merged(int row, int column) const {
    if constexpr (kConfig.is_wide()) {
      const int w = row / kRowTile, at = row % kRowTile;
      const float2 stats = shared.stats[w][at];
      return {*reinterpret_cast<const float4*>(&shared.o[w][at][column]), stats.x, stats.y};
    } else if constexpr (kAddsWarps) {
      Partial all;
      all.max = max_of_warps(row);
#pragma unroll
      for (int w = 0; w < kNumWarps; ++w) {
        all.add(float4{}, shared.stats[w][row].x, shared.stats[w][row].y);
      }
      all.o = *reinterpret_cast<const float4*>(&shared.o[0][row][column]);
      return all;
    } else {
      Partial all;
      all.max = max_of_warps(row);
#pragma unroll
      for (int w = 0; w < kNumWarps; ++w) {
        all.add(*reinterpret_cast<const float4*>(&shared.o[w][row][column]), shared.stats[w][row].x,
                shared.stats[w][row].y);
      }
      return all;
    }
  }

  // Calls body(row, column) for this thread's vectors of the segment's rows.
  template <typename Body>
  __device__ void for_each_vector(Body&& body) const {
    for (int i = threadIdx.x; i < segment.num_rows * kRowVectors; i += kNumThreads) {
      body(i / kRowVectors, i % kRowVectors * kVector);
    }
  }

  // Of a whole segment.
  __device__ void finish() const {
    for_each_vector([&](int row, int column) { write(row, column, merged(row, column)); });
  }

  __device__ void write(int row, int column, const Partial& x) const {
    const int head = segment.head(row);
    const int64_t query = s.first_query + segment.query(row);
    const int64_t token = token_of(row);
    const int64_t lse_at = p.cu_seqlens_q != nullptr
                               ? head * p.total_q + token
                               : (index * p.num_heads_q + head) * p.seqlen_q + query;
    write_result<T>(p, x, head, token, lse_at, column);
  }

  __device__ int64_t token_of(int row) const {
    const int64_t query = s.first_query + segment.query(row);
    return p.cu_seqlens_q != nullptr ? query : index * p.seqlen_q + query;
  }

  // ---- Parts ----

  // Where a row of a part stands: parts are a block's, or one of the fixed splits of its token and
  // head.
  __device__ int64_t place(int part, int row) const {
    if constexpr (!kFixed) return int64_t{part} * kRows + row;
    const int64_t token =
        p.part_tokens < p.total_q ? index * p.plan.max_queries + segment.query(row) : token_of(row);
    return (part * p.part_tokens + token) * p.num_heads_q + segment.head(row);
  }
  __device__ float* part_of(int64_t place, int column) const {
    return p.partial_out + place * (kFixed ? p.head_dim : kHeadDim) + column;
  }

  __device__ void leave_part(int part) const {
    for_each_vector([&](int row, int column) {
      const Partial x = merged(row, column);
      const int64_t at = place(part, row);
      if (!kFixed || column < p.head_dim)
        __stcg(reinterpret_cast<float4*>(part_of(at, column)), x.o);
      if (column == 0) __stcg(reinterpret_cast<float2*>(p.partial_stats) + at, {x.max, x.sum});
    });
  }
  // What this block has left of the segment is there for others.
  __device__ void announce() const {
    __syncthreads();
    if (threadIdx.x == 0) ptx::store_release(p.part_flags + blockIdx.x, p.launch_number);
  }

  // The last block of a segment adds the parts, in their order: those of the blocks before it and
  // its own. It waits for them; they wait for nobody before they leave theirs. That they have
  // started is so where blocks start in the order of their index, as they do on every GPU so far;
  // where all blocks fit the GPU at once, as the grid is chosen, the order does not matter.
  // block_of(part): whose it is; the segment's first block is block_of(0).
  template <typename BlockOf>
  __device__ void combine(BlockOf block_of) const {
    const int first_block = block_of(0);
    const int own_block = static_cast<int>(blockIdx.x);
    const int num_blocks = (own_block - first_block) / block_step;  // before this one
    const int num_parts = kFixed ? s.units : num_blocks;
#pragma unroll 1
    for (int item = 0; item < kItems; ++item) {
      const int i = threadIdx.x + item * kNumThreads;
      const int row = i / kRowVectors, column = i % kRowVectors * kVector;
      Partial all;
#pragma unroll 1
      for (int begin = 0; begin < num_parts; begin += kMaxPartsAtOnce) {
        const int count = min(kMaxPartsAtOnce, num_parts - begin);
        if (item == 0 || num_parts > kMaxPartsAtOnce) gather_stats(begin, count, block_of);
        if (row < segment.num_rows) {
          add_parts(kFixed ? begin : first_block + begin * block_step, count, row, column, all);
        }
      }
      if (row >= segment.num_rows) continue;
      if constexpr (kFixed) {
        write(row, column, all);
      } else {
        const Partial own = merged(row, column);
        Partial x;
        x.max = fmaxf(all.max, own.max);
        x.add(all.o, all.max, all.sum);
        x.add(own.o, own.max, own.sum);
        write(row, column, x);
      }
    }
    clear_flags(first_block);
  }
  // For a graph's next replay, which comes with the same number.
  __device__ void clear_flags(int first_block) const {
    __syncthreads();
    const int own_block = static_cast<int>(blockIdx.x);
    for (int i = first_block + threadIdx.x * block_step; i < own_block;
         i += kNumThreads * block_step) {
      p.part_flags[i] = 0;
    }
  }

  // Waits for parts and takes their statistics. A flag is there when it carries this launch's
  // number: the workspace holds anything at first.
  template <typename BlockOf>
  __device__ void gather_stats(int begin, int count, BlockOf block_of) const {
    __syncthreads();  // the statistics before are read
    const int first_part = kFixed ? 0 : block_of(0);
    for (int i = threadIdx.x; i < count * segment.num_rows; i += kNumThreads) {
      const int part = begin + i % count, row = i / count;
      const int at = kFixed ? part : first_part + part * block_step;
      const int block = kFixed ? block_of(part) : at;
      while (block != static_cast<int>(blockIdx.x) &&
             ptx::load_acquire(p.part_flags + block) != p.launch_number) {
      }
      const auto* stats = reinterpret_cast<const float2*>(p.partial_stats);
      shared.part_stats[row][i % count] = __ldcg(stats + place(at, row));
    }
    __syncthreads();
  }

  __device__ void add_parts(int begin, int count, int row, int column, Partial& all) const {
    const float2(&stats)[kMaxPartsAtOnce] = shared.part_stats[row];
    Partial x;
    x.max = all.max;
    for (int i = 0; i < count; ++i) x.max = fmaxf(x.max, stats[i].x);
    x.add(all.o, all.max, all.sum);
#pragma unroll 1
    for (int first = 0; first < count; first += kLoadsAtOnce) {
      float4 o[kLoadsAtOnce];
#pragma unroll
      for (int i = 0; i < kLoadsAtOnce; ++i) {
        if (first + i < count && (!kFixed || column < p.head_dim)) {
          const int64_t at = place(begin + (first + i) * (kFixed ? 1 : block_step), row);
          o[i] = __ldcg(reinterpret_cast<const float4*>(part_of(at, column)));
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
