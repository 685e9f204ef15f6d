// What the tensor-core kernels of flash_attn share: which rows a block works on, how its tiles come
// into shared memory, scores, masks, the online softmax and the way out.
//
// Fragments: of a 16 x 8 tile of accumulators lane l holds rows l / 4 (elements 0, 1) and l / 4 + 8
// (elements 2, 3), columns l % 4 * 2 and the next. kRowTiles such tiles stand one under the other.
#pragma once

#include <cfloat>
#include <cstdint>

#include "attention/params.h"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "tile/convert.cuh"
#include "tile/kernel_entry.cuh"
#include "tile/reduce.cuh"
#include "tile/swizzled_tile.cuh"

namespace llamatelemetry {

struct FlashGrid {
  FlashAttnParams attn;
  int row_blocks;       // of every head
  unsigned group_size;  // query heads that share a key head
  int section_heads;    // heads of the batch whose keys and values stay in L2 together
  uint32_t k_step;      // bytes between the rows of a tile that one thread loads
  uint32_t v_step;
  float factor;  // from what stands for a score to units of log2
  // Whether scores are more than dot products scaled: then that is done first, and factor is 1.
  bool changes_scores;
  bool aligned;  // whether rows of q, k and v can be moved by 16 bytes
};

// Grid [batch * num_heads_q * row_blocks]. A section of heads after the other; in a section the
// last rows first, as they see the most keys under a causal mask and the longest should not start
// last.
struct FlashWork {
  int index;  // of the sequence
  int head;
  int kv_head;
  int first_row;
  int num_queries;
  int num_keys;
  int end_key;  // keys from here on are in no page

  __device__ FlashWork(const FlashGrid& grid, int block_rows) {
    const FlashAttnParams& p = grid.attn;
    const auto heads = static_cast<unsigned>(p.batch * p.num_heads_q);
    const unsigned per_section = static_cast<unsigned>(grid.section_heads) * grid.row_blocks;
    const unsigned section = blockIdx.x / per_section;
    const unsigned within = blockIdx.x % per_section;
    const unsigned first_head = section * grid.section_heads;
    const unsigned num_heads = min(heads - first_head, static_cast<unsigned>(grid.section_heads));
    const unsigned head_of_batch = first_head + within % num_heads;
    index = static_cast<int>(head_of_batch / static_cast<unsigned>(p.num_heads_q));
    head = static_cast<int>(head_of_batch % static_cast<unsigned>(p.num_heads_q));
    kv_head = static_cast<int>(static_cast<unsigned>(head) / grid.group_size);
    first_row = static_cast<int>(grid.row_blocks - 1 - within / num_heads) * block_rows;
    const FlashSequence sequence = flash_sequence(p, index);
    num_queries = static_cast<int>(sequence.num_queries);
    num_keys = end_key = static_cast<int>(sequence.num_keys);
    if (p.page_size > 0) end_key = static_cast<int>(min(sequence.num_keys, p.seqlen_k));
  }

  // The keys that a row of the sequence sees.
  __device__ KeyRange keys_of_row(const FlashAttnParams& p, int row) const {
    KeyRange keys = window_keys(p.window_left, p.window_right, num_keys, num_queries, row);
    keys.end = min(keys.end, static_cast<int64_t>(end_key));
    keys.begin = min(keys.begin, keys.end);
    return keys;
  }
};

// Rows of one head of one sequence.
template <typename T>
struct HeadRows {
  const T* first;
  int64_t stride;

  __device__ HeadRows(const Heads& x, int64_t index, int64_t first_token, int64_t head)
      : first(static_cast<const T*>(x.data) + index * x.batch_stride +
              first_token * x.token_stride + head * x.head_stride),
        stride(x.token_stride) {}
};

// The same where keys lie in pages.
template <typename T>
struct PagedRows {
  const T* head;  // of block 0
  const int32_t* table;
  int64_t block_stride;
  int64_t slot_stride;
  int page_size;

  __device__ PagedRows(const FlashAttnParams& p, const Heads& x, int64_t index, int64_t kv_head)
      : head(static_cast<const T*>(x.data) + kv_head * x.head_stride),
        table(p.block_table + index * p.block_table_stride),
        block_stride(x.batch_stride),
        slot_stride(x.token_stride),
        page_size(static_cast<int>(p.page_size)) {}

  __device__ const T* row(int key) const {
    return head + table[key / page_size] * block_stride + key % page_size * slot_stride;
  }
};

// A thread's share of tiles of kRows rows: chunks in the same column of every kRowStep-th row.
template <typename Tile, int kRows, int kNumThreads>
struct TileShare {
  static constexpr int kRowStep = kNumThreads / Tile::kSpan;
  static constexpr int kSteps = kRows / kRowStep;
  static_assert(kRows % kRowStep == 0 && kRowStep % 8 == 0);
  int row;
  int chunk;

  __device__ TileShare() : row(threadIdx.x / Tile::kSpan), chunk(threadIdx.x % Tile::kSpan) {}

  static constexpr int kCount = kSteps * Tile::kChunks / Tile::kSpan;

  // Calls each(number of the chunk in this share, its offset in the tile, its row, its column).
  template <int kUnroll = kCount, typename Each>
  __device__ void for_each(Each each) const {
    const uint32_t offset = Tile::offset(row, chunk);
#pragma unroll kUnroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll kUnroll
      for (int span = 0; span < Tile::kChunks; span += Tile::kSpan) {
        each((step * Tile::kChunks + span) / Tile::kSpan,
             offset + step * kRowStep * Tile::kRowBytes + span * Tile::kChunkBytes,
             row + step * kRowStep, chunk + span);
      }
    }
  }
};

// Eight elements of a row, wherever it starts.
template <typename T>
__device__ inline uint4 load_unaligned(const T* p) {
  const auto* halves = reinterpret_cast<const uint16_t*>(p);
  const auto two = [&](int i) {
    return halves[2 * i] | static_cast<uint32_t>(halves[2 * i + 1]) << 16;
  };
  return {two(0), two(1), two(2), two(3)};
}

template <int kRowTiles, int kKeyTiles, typename Each>
__device__ inline void for_each_score(float (&s)[kRowTiles][kKeyTiles][4], Each each) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) each(s[r][t][e], r, t, e);
    }
  }
}

// From dot products to scores in units of log2, where that is more than a factor.
template <int kRowTiles, int kKeyTiles>
__device__ inline void change_scores(float (&s)[kRowTiles][kKeyTiles][4], const FlashAttnParams& p,
                                     const FlashWork& work, int first_row, int first_key) {
  const int lane = threadIdx.x % kWarpSize;
  const float slope = p.alibi_slopes == nullptr
                          ? 0.0f
                          : kLog2E * p.alibi_slopes[work.index * p.alibi_batch_stride + work.head];
  const int key = first_key + lane % 4 * 2;
  if (p.softcap > 0) {
    // tanh(x) = 1 - 2 / (e^2x + 1), right at both ends too
    const float into_cap = __fdividef(2 * kLog2E * p.softmax_scale, p.softcap);
    for_each_score(s, [&](float& score, int, int, int) {
      const float power = ptx::exp2_approx(score * into_cap);
      score = kLog2E * p.softcap - kLog2E * p.softcap * __fdividef(2.0f, power + 1.0f);
    });
  } else {
    const float scale = kLog2E * p.softmax_scale;
    for_each_score(s, [&](float& score, int, int, int) { score *= scale; });
  }
  if (slope == 0) return;
  const int distance = work.num_keys - work.num_queries + first_row + lane / 4 - key;
  for_each_score(s, [&](float& score, int r, int t, int e) {
    score -= slope * fabsf(static_cast<float>(distance + 16 * r + e / 2 * 8 - 8 * t - e % 2));
  });
}

// -infinity where the row does not see the key.
template <int kRowTiles, int kKeyTiles>
__device__ inline void mask_scores(float (&s)[kRowTiles][kKeyTiles][4], const FlashAttnParams& p,
                                   const FlashWork& work, int first_row, int first_key) {
  const int lane = threadIdx.x % kWarpSize;
  const int column = first_key + lane % 4 * 2;
  auto row = static_cast<uint32_t>(first_row + lane / 4);
  ptx::keep(row);  // few tiles are masked: the bounds should not wait in registers for them
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const KeyRange keys = work.keys_of_row(p, static_cast<int>(row) + 16 * r + 8 * half);
      const auto begin = static_cast<int>(keys.begin);
      const auto count = static_cast<unsigned>(keys.end - keys.begin);
#pragma unroll
      for (int t = 0; t < kKeyTiles; ++t) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool seen = static_cast<unsigned>(column + 8 * t + e - begin) < count;
          if (!seen) s[r][t][2 * half + e] = -INFINITY;
        }
      }
    }
  }
}

// Combines over the four lanes that share a row.
template <typename Combine>
__device__ inline float quad_reduce(float value) {
  value = Combine{}(value, __shfl_xor_sync(0xffffffff, value, 1));
  return Combine{}(value, __shfl_xor_sync(0xffffffff, value, 2));
}

// Scores s in units of log2 / factor become weights 2^(s * factor - largest).
template <int kRowTiles>
struct OnlineSoftmax {
  // Weights may reach 2^kSlack before a row's output is scaled down; exact, as every weight of the
  // row and its sum use the same largest.                      (conditional rescale:
  // FlashAttention-4)
  static constexpr float kSlack = 8.0f;
  static constexpr unsigned kAllLanes = 0xffffffff;

  float largest[kRowTiles][2];  // below every score until the row sees a key
  float sum[kRowTiles][2];      // of this lane's columns

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      largest[r][0] = largest[r][1] = -FLT_MAX;
      sum[r][0] = sum[r][1] = 0;
    }
  }

  // Raises largest where a score is well above it. Which other rows the warp holds decides whether
  // it looks, not what a row gets.
  template <int kKeyTiles, int kDimTiles>
  __device__ void raise(const float (&s)[kRowTiles][kKeyTiles][4], float factor,
                        float (&o)[kRowTiles][kDimTiles][4]) {
    float top[kRowTiles][2];  // of this lane's columns
    bool rises = false;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float value = fmaxf(s[r][0][2 * half], s[r][0][2 * half + 1]);
#pragma unroll
        for (int t = 1; t < kKeyTiles; ++t) {
          value = fmaxf(value, fmaxf(s[r][t][2 * half], s[r][t][2 * half + 1]));
        }
        top[r][half] = value * factor;
        rises |= top[r][half] - kSlack > largest[r][half];
      }
    }
    if (!__any_sync(kAllLanes, rises)) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float row_top = quad_reduce<Max>(top[r][half]);
        const float now = row_top - kSlack > largest[r][half] ? row_top : largest[r][half];
        const float scale = ptx::exp2_approx(largest[r][half] - now);  // 1 where nothing changes
        largest[r][half] = now;
        sum[r][half] *= scale;
#pragma unroll
        for (int t = 0; t < kDimTiles; ++t) {
          o[r][t][2 * half] *= scale;
          o[r][t][2 * half + 1] *= scale;
        }
      }
    }
  }

  // The 16 columns of tiles `tile` and the next as a fragment a of the product with the values.
  template <typename T, int kKeyTiles>
  __device__ void weigh(const float (&s)[kRowTiles][kKeyTiles][4], float factor, int tile,
                        uint32_t (&weights)[kRowTiles][4]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* two = s[r][tile + t] + 2 * half;
          const float a = ptx::exp2_approx(fmaf(two[0], factor, -largest[r][half]));
          const float b = ptx::exp2_approx(fmaf(two[1], factor, -largest[r][half]));
          sum[r][half] += a + b;
          weights[r][2 * t + half] = pack_two(a, b, T{});
        }
      }
    }
  }
};

// Divides by the sums and writes out and lse of the warp's rows from first_row. stage: where the
// warp may keep its 16 * kRowTiles rows in shared memory.
template <typename T, typename Tile, int kRowTiles, int kDimTiles>
__device__ inline void write_rows(const FlashAttnParams& p, const FlashWork& work,
                                  const float (&o)[kRowTiles][kDimTiles][4],
                                  const OnlineSoftmax<kRowTiles>& softmax, int first_row,
                                  char* stage) {
  const int lane = threadIdx.x % kWarpSize;
  const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[work.head] * kLog2E;
  // Of the four lanes that share 2 * kRowTiles rows, each writes the lse of one.
  float own_sum = 0;
  float own_largest = 0;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A sink is a score without a value. Without a key the sum is the sink's, or 0.
      float sum = quad_reduce<Sum>(softmax.sum[r][half]);
      const float largest = fmaxf(softmax.largest[r][half], sink);
      float scale = ptx::exp2_approx(softmax.largest[r][half] - largest);
      sum = sum * scale + (sink == -INFINITY ? 0.0f : ptx::exp2_approx(sink - largest));
      scale = sum == 0.0f ? 0.0f : __fdividef(scale, sum);
      if (lane % 4 == 2 * r + half) {
        own_sum = sum;
        own_largest = largest;
      }
      const uint32_t row = Tile::offset(16 * r + lane / 4 + 8 * half, 0) + lane % 4 * 4;
#pragma unroll
      for (int t = 0; t < kDimTiles; ++t) {
        // Chunk t from chunk 0: within a span by exchange, from span to span by distance.
        const uint32_t to = (row ^ (t % Tile::kSpan * Tile::kChunkBytes)) +
                            t / Tile::kSpan * Tile::kSpan * Tile::kChunkBytes;
        *reinterpret_cast<uint32_t*>(stage + to) =
            pack_two(o[r][t][2 * half] * scale, o[r][t][2 * half + 1] * scale, T{});
      }
    }
  }
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t first_token = packed ? p.cu_seqlens_q[work.index] : work.index * p.seqlen_q;
  const int own_row = first_row + lane / 4 + lane % 4 * 8;
  if (lane % 4 < 2 * kRowTiles && own_row < work.num_queries) {
    float* lse = packed ? p.lse + work.head * p.total_q + first_token
                        : p.lse + (work.index * p.num_heads_q + work.head) * p.seqlen_q;
    lse[own_row] = own_sum == 0.0f ? -INFINITY : (own_largest + __log2f(own_sum)) * kLn2;
  }
  __syncwarp();

  constexpr int kRowStep = kWarpSize / Tile::kSpan;
  int row = lane / Tile::kSpan;
  const int chunk = lane % Tile::kSpan;
  const int64_t row_elements = p.num_heads_q * p.head_dim;
  T* out = static_cast<T*>(p.out) + (first_token + first_row + row) * row_elements +
           work.head * p.head_dim + chunk * Tile::kChunkElements;
#pragma unroll
  for (int step = 0; step < 16 * kRowTiles; step += kRowStep) {
    if (first_row + row < work.num_queries) {
#pragma unroll
      for (int span = 0; span < Tile::kChunks; span += Tile::kSpan) {
        if ((chunk + span) * Tile::kChunkElements < p.head_dim) {
          *reinterpret_cast<uint4*>(out + span * Tile::kChunkElements) =
              *reinterpret_cast<const uint4*>(stage + Tile::offset(row, chunk + span));
        }
      }
    }
    row += kRowStep;
    out += kRowStep * row_elements;
  }
}

// ---- On the host ----

constexpr int64_t kMaxTokenStride = 1 << 22;

// Whether load_tile can take whole chunks: within a tile offsets are 32 bits.
inline bool has_whole_chunks(const Heads& x, int64_t batch, int64_t tokens, int64_t heads) {
  return rows_are_aligned(x, batch, tokens, heads, 2) && x.token_stride < kMaxTokenStride;
}

inline FlashGrid flash_grid(const FlashAttnParams& p, int block_rows, int row_step,
                            int64_t l2_bytes) {
  const bool changes = p.softcap > 0 || p.alibi_slopes != nullptr || !(p.softmax_scale > 0);
  const int64_t heads = p.batch * p.num_heads_q;
  const int64_t num_parts = p.page_size > 0 ? INT64_MAX : p.batch;  // of k and v
  const int64_t key_bytes = 4 * p.head_dim * p.seqlen_k * p.num_heads_kv / p.num_heads_q;
  int64_t section = key_bytes > 0 ? l2_bytes / key_bytes : heads;
  if (section < 1) section = 1;
  if (section > heads) section = heads;
  return {.attn = p,
          .row_blocks = static_cast<int>((p.seqlen_q + block_rows - 1) / block_rows),
          .group_size = static_cast<unsigned>(p.num_heads_q / p.num_heads_kv),
          .section_heads = static_cast<int>(section),
          .k_step = static_cast<uint32_t>(p.k.token_stride * row_step * 2),
          .v_step = static_cast<uint32_t>(p.v.token_stride * row_step * 2),
          .factor = changes ? 1.0f : p.softmax_scale * kLog2E,
          .changes_scores = changes,
          .aligned = has_whole_chunks(p.q, p.batch, p.total_q, p.num_heads_q) &&
                     has_whole_chunks(p.k, num_parts, p.total_k, p.num_heads_kv) &&
                     has_whole_chunks(p.v, num_parts, p.total_k, p.num_heads_kv)};
}

template <typename Kernel>
Error launch_flash_kernel(const FlashAttnParams& p, int64_t l2_bytes, Stream stream) {
  const int64_t row_blocks = (p.seqlen_q + Kernel::kRows - 1) / Kernel::kRows;
  if (row_blocks > INT32_MAX / (p.batch * p.num_heads_q)) {
    return "batch * num_heads_q * seqlen_q / 128 must be below 2^31, got more";
  }
  const FlashGrid grid = flash_grid(p, Kernel::kRows, Kernel::kRowStep, l2_bytes);
  const int64_t num_blocks = p.batch * p.num_heads_q * row_blocks;
  cudaFuncSetAttribute(kernel_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       Kernel::kSharedBytes);
  kernel_entry<Kernel>
      <<<static_cast<unsigned>(num_blocks), Kernel::kNumThreads, Kernel::kSharedBytes, stream>>>(
          grid);
  return last_launch_error();
}

}  // namespace llamatelemetry
