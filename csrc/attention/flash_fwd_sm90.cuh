// out = softmax(q k^T) v on Hopper, after FlashAttention-3 (Shah et al. 2024): persistent blocks of
// one warp that copies and kConsumers warpgroups that compute, 64 query rows each.
//
// What bounds it: the tensor cores (head_dim >= 128) or the exponentials (64). So a warpgroup gives
// the tensor cores the scores of the next keys before it weighs these, and the warpgroups take
// turns where that measures better. Scores, weights and results stay in registers.
//
// Keys run from the last block of a tile to the first, so that what the window cuts comes first.
// Grid: at most one block per place on the GPU. Block (kConsumers + 1) * 128.
#pragma once

#include <cstdint>

#include "attention/flash_sm90_params.h"
#include "attention/flash_sm90_schedule.cuh"
#include "attention/flash_sm90_softmax.cuh"
#include "common/dtype.h"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace llamatelemetry {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupRows = 64;      // query rows of a warpgroup
constexpr int kColumnBlock = 64;    // columns of a swizzled row of 128 bytes
constexpr int kColumnBlockBytes = 128;
constexpr int kDepth = 16;  // of one wgmma

template <int kWidth, int kNumConsumers, int kKeys, int kNumStages, int kNumQueryStages,
          bool kTakesTurns, int kBlocksPerSm = 1, int kNumPolynomials = 0>
struct FlashTile {
  static constexpr int kHeadDim = kWidth;  // columns computed; wider than head_dim where it is odd
  static constexpr int kColumnBlocks = (kWidth + kColumnBlock - 1) / kColumnBlock;
  static constexpr int kConsumers = kNumConsumers;
  static constexpr int kBlockM = kNumConsumers * kGroupRows;
  static constexpr int kBlockN = kKeys;
  static constexpr int kStages = kNumStages;
  static constexpr int kQueryStages = kNumQueryStages;
  static constexpr bool kTurns = kTakesTurns;
  static constexpr int kBlocks = kBlocksPerSm;
  static constexpr int kPolynomials = kNumPolynomials;
  static constexpr int kThreads = (kNumConsumers + 1) * kGroupThreads;
  // 65536 registers: what the copying warpgroup does not need goes to the others.
  static constexpr int kCopyRegisters = kNumConsumers == 3 ? 32 : 24;
  static constexpr int kComputeRegisters = kBlocksPerSm == 2 ? 104
                                                             : (kNumConsumers == 2   ? 240
                                                                : kNumConsumers == 3 ? 160
                                                                                     : 112);
  static constexpr int kQueryBytes = kBlockM * kColumnBlocks * kColumnBlockBytes;
  static constexpr int kKeyBytes = kBlockN * kColumnBlocks * kColumnBlockBytes;
};

template <typename Tile>
struct alignas(1024) FlashShared {
  // Each: kColumnBlocks parts of [rows][64], swizzled.
  uint8_t q[Tile::kQueryStages][Tile::kQueryBytes];
  uint8_t k[Tile::kStages][Tile::kKeyBytes];
  uint8_t v[Tile::kStages][Tile::kKeyBytes];
  uint64_t q_full[Tile::kQueryStages];
  uint64_t q_empty[Tile::kQueryStages];
  uint64_t k_full[Tile::kStages];
  uint64_t k_empty[Tile::kStages];
  uint64_t v_full[Tile::kStages];
  uint64_t v_empty[Tile::kStages];
};

struct FlashSm90Args {
  CUtensorMap q_map;  // [head_dim, tokens, heads, batch]
  CUtensorMap k_map;
  CUtensorMap v_map;
  FlashSm90Params p;
  FlashSchedule schedule;
  // 0 where a tensor has stride 0 along that dimension, so that its coordinate stays 0.
  int q_head_step, q_batch_step;
  int k_head_step, k_batch_step;
  int v_head_step, v_batch_step;
};

// A ring of kSize buffers: which one is next, and the parity of its round.
template <int kSize>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++slot == kSize) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// What both roles know of a tile.
struct FlashTileWork {
  FlashTilePlace place;
  FlashSequence sequence;
  FlashWindow window;
  int first_row;
  int num_queries;
};
template <typename Tile>
__device__ inline FlashTileWork work_of_tile(const FlashSm90Args& a, int tile) {
  const FlashAttnParams& p = a.p.call;
  FlashTileWork work;
  work.place = place_of_tile(a.schedule, tile, static_cast<int>(p.num_heads_q));
  work.sequence = flash_sequence(p, work.place.index);
  work.num_queries = static_cast<int>(work.sequence.num_queries);
  const int num_keys = static_cast<int>(work.sequence.num_keys);
  work.window = {static_cast<int>(p.window_left), static_cast<int>(p.window_right), num_keys,
                 num_keys - work.num_queries};
  work.first_row = work.place.row_block * Tile::kBlockM;
  return work;
}
template <typename Tile, FlashMask kMask>
__device__ inline KeyBlocks blocks_of_rows(const FlashTileWork& work, int first, int num_rows) {
  return key_blocks<kMask, Tile::kBlockN>(work.window, first,
                                          min(first + num_rows, work.num_queries) - 1);
}

// One thread: copies what the tiles need, as far ahead as the rings allow.
template <typename Tile, FlashMask kMask>
__device__ void copy_tiles(const FlashSm90Args& a, FlashShared<Tile>& s) {
  const FlashAttnParams& p = a.p.call;
  Ring<Tile::kQueryStages> q_ring;
  Ring<Tile::kStages> k_ring;
  Ring<Tile::kStages> v_ring;
  const uint64_t once = ptx::policy_evict_first();
  const uint64_t often = ptx::policy_evict_last();
  const int group = static_cast<int>(p.num_heads_q / p.num_heads_kv);

  for (int round = 0;; ++round) {
    const int tile = tile_of_round(round, blockIdx.x, gridDim.x);
    if (round * static_cast<int>(gridDim.x) >= a.schedule.num_tiles) break;
    if (tile >= a.schedule.num_tiles) continue;
    const FlashTileWork work = work_of_tile<Tile>(a, tile);
    const KeyBlocks blocks = blocks_of_rows<Tile, kMask>(work, work.first_row, Tile::kBlockM);
    if (blocks.hi <= blocks.lo) continue;
    const int kv_head = work.place.head / group;
    const int first_query = static_cast<int>(work.sequence.first_query) + work.first_row;
    const int first_key = static_cast<int>(work.sequence.first_key);
    const int batch = p.cu_seqlens_q == nullptr ? work.place.index : 0;

    const auto load_k = [&](int n) {
      const uint32_t full = ptx::shared_address(&s.k_full[k_ring.slot]);
      ptx::mbarrier_wait(ptx::shared_address(&s.k_empty[k_ring.slot]), k_ring.parity ^ 1);
      ptx::mbarrier_arrive_expect(full, Tile::kKeyBytes);
      const uint32_t to = ptx::shared_address(s.k[k_ring.slot]);
#pragma unroll
      for (int c = 0; c < Tile::kColumnBlocks; ++c) {
        ptx::tma_load_4d(to + c * Tile::kBlockN * kColumnBlockBytes, &a.k_map, full,
                         c * kColumnBlock, first_key + n * Tile::kBlockN, kv_head * a.k_head_step,
                         batch * a.k_batch_step, often);
      }
      k_ring.advance();
    };
    const auto load_v = [&](int n) {
      const uint32_t full = ptx::shared_address(&s.v_full[v_ring.slot]);
      ptx::mbarrier_wait(ptx::shared_address(&s.v_empty[v_ring.slot]), v_ring.parity ^ 1);
      ptx::mbarrier_arrive_expect(full, Tile::kKeyBytes);
      const uint32_t to = ptx::shared_address(s.v[v_ring.slot]);
#pragma unroll
      for (int c = 0; c < Tile::kColumnBlocks; ++c) {
        ptx::tma_load_4d(to + c * Tile::kBlockN * kColumnBlockBytes, &a.v_map, full,
                         c * kColumnBlock, first_key + n * Tile::kBlockN, kv_head * a.v_head_step,
                         batch * a.v_batch_step, often);
      }
      v_ring.advance();
    };
    const auto load_q = [&] {
      const uint32_t full = ptx::shared_address(&s.q_full[q_ring.slot]);
      ptx::mbarrier_wait(ptx::shared_address(&s.q_empty[q_ring.slot]), q_ring.parity ^ 1);
      ptx::mbarrier_arrive_expect(full, Tile::kQueryBytes);
      const uint32_t to = ptx::shared_address(s.q[q_ring.slot]);
#pragma unroll
      for (int c = 0; c < Tile::kColumnBlocks; ++c) {
        ptx::tma_load_4d(to + c * Tile::kBlockM * kColumnBlockBytes, &a.q_map, full,
                         c * kColumnBlock, first_query, work.place.head * a.q_head_step,
                         batch * a.q_batch_step, once);
      }
      q_ring.advance();
    };

    // K runs one block ahead of V, as the products do.
    load_k(blocks.hi - 1);
    load_q();
    for (int n = blocks.hi - 2; n >= blocks.lo; --n) {
      load_k(n);
      load_v(n + 1);
    }
    load_v(blocks.lo);
  }
}

// s = q k^T for one warpgroup's 64 rows. Ends without waiting.
template <typename T, typename Tile>
__device__ inline void multiply_keys(float (&r_s)[Tile::kBlockN / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int step = 0; step < Tile::kHeadDim / kDepth; ++step) {
    constexpr int kStepsPerColumnBlock = kColumnBlock / kDepth;
    const int block = step / kStepsPerColumnBlock;
    const int within = step % kStepsPerColumnBlock * kDepth * 2;
    ptx::wgmma_shared<T, Tile::kBlockN>(
        r_s, q + ((block * Tile::kBlockM * kColumnBlockBytes + within) >> 4),
        k + ((block * Tile::kBlockN * kColumnBlockBytes + within) >> 4), step > 0);
  }
  ptx::wgmma_commit();
}
// o += p v. Ends without waiting.
template <typename T, typename Tile>
__device__ inline void multiply_values(float (&r_o)[Tile::kHeadDim / 2],
                                       const uint32_t (&r_p)[Tile::kBlockN / kDepth][4],
                                       uint64_t v) {
#pragma unroll
  for (int step = 0; step < Tile::kBlockN / kDepth; ++step) {
    ptx::wgmma_registers<T, Tile::kHeadDim>(r_o, r_p[step],
                                            v + ((step * kDepth * kColumnBlockBytes) >> 4), true);
  }
  ptx::wgmma_commit();
}

// Two rows of results to device memory. The four lanes of a quad trade words so that each holds
// eight consecutive columns: whole sectors leave at once.
template <typename T, typename Tile>
__device__ inline void store_rows(const FlashSm90Args& a, const FlashTileWork& work, int row,
                                  const float (&r_o)[Tile::kHeadDim / 2], TwoRows rows) {
  const FlashAttnParams& p = a.p.call;
  const int lane = threadIdx.x % 4;
  const float scale_log2 = a.p.shapes_scores ? 1.0f : a.p.scale_log2;
  const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[work.place.head] * kLog2E;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t first_token = packed ? work.sequence.first_query : work.place.index * p.seqlen_q;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = quad_sum(rows.sum[h]);
    float reference = rows.largest[h] * scale_log2;
    float weight = 1.0f;
    if (sink > -INFINITY) {
      const float largest = fmaxf(reference, sink);
      weight = ptx::ex2(reference - largest);
      sum = sum * weight + ptx::ex2(sink - largest);
      reference = largest;
    }
    const float scale = sum == 0.0f ? 0.0f : weight / sum;
    const int query = row + 8 * h;
    const bool exists = query < work.num_queries;
    const int64_t token = first_token + query;
    if (exists && lane == 0) {
      float* lse =
          packed
              ? p.lse + work.place.head * p.total_q + token
              : p.lse + (work.place.index * p.num_heads_q + work.place.head) * p.seqlen_q + query;
      *lse = sum == 0.0f ? -INFINITY : (reference + __log2f(sum)) * kLn2;
    }
    T* out = static_cast<T*>(p.out) + (token * p.num_heads_q + work.place.head) * p.head_dim;
#pragma unroll
    for (int j = 0; j < Tile::kHeadDim / 8; j += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (j + i) + 2 * h;
        word[i] = pack_two<T>(r_o[at] * scale, r_o[at + 1] * scale);
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffff, lane & 1 ? word[i] : word[i + 1], 1);
        (lane & 1 ? word[i] : word[i + 1]) = got;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t got = __shfl_xor_sync(0xffffffff, lane & 2 ? word[i] : word[i + 2], 2);
        (lane & 2 ? word[i] : word[i + 2]) = got;
      }
      const int column = 8 * (j + lane);
      if (exists && column < p.head_dim) {
        *reinterpret_cast<uint4*>(out + column) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

// One warpgroup: its 64 rows of each tile.
template <typename T, typename Tile, FlashMask kMask>
__device__ void compute_tiles(const FlashSm90Args& a, FlashShared<Tile>& s) {
  constexpr int kBlockN = Tile::kBlockN;
  constexpr int kTurnBarrier = 1;  // one for each warpgroup
  constexpr int kTailBarrier = kTurnBarrier + Tile::kConsumers;
  const FlashAttnParams& p = a.p.call;
  // The same in every lane, and known to be so.
  const int group = __shfl_sync(0xffffffff, threadIdx.x / kGroupThreads - 1, 0);
  const int lane = threadIdx.x % 32;
  const int row_in_group = threadIdx.x % kGroupThreads / 32 * 16 + lane / 4;
  const int column = 2 * (lane % 4);
  const float scale_log2 = a.p.shapes_scores ? 1.0f : a.p.scale_log2;
  Ring<Tile::kQueryStages> q_ring;
  Ring<Tile::kStages> k_ring;
  Ring<Tile::kStages> v_ring;

  const auto release = [&](uint64_t& barrier) {
    if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(&barrier));
  };
  const auto wait_k = [&] {
    ptx::mbarrier_wait(ptx::shared_address(&s.k_full[k_ring.slot]), k_ring.parity);
  };
  const auto wait_v = [&] {
    ptx::mbarrier_wait(ptx::shared_address(&s.v_full[v_ring.slot]), v_ring.parity);
  };
  const auto release_k = [&] {
    release(s.k_empty[k_ring.slot]);
    k_ring.advance();
  };
  const auto release_v = [&] {
    release(s.v_empty[v_ring.slot]);
    v_ring.advance();
  };
  const auto begin_turn = [&] {
    if constexpr (Tile::kTurns) ptx::named_barrier_sync(kTurnBarrier + group, 2 * kGroupThreads);
  };
  const auto end_turn = [&] {
    if constexpr (Tile::kTurns) {
      const int next = group + 1 == Tile::kConsumers ? 0 : group + 1;
      ptx::named_barrier_arrive(kTurnBarrier + next, 2 * kGroupThreads);
    }
  };
  // Blocks of the tile that this warpgroup's rows do not need.
  const auto pass_blocks = [&](int count, int turns) {
    for (int i = 0; i < count; ++i) {
      if (i < turns) {
        begin_turn();
        end_turn();
      }
      wait_k();
      release_k();
      wait_v();
      release_v();
    }
  };
  if constexpr (Tile::kTurns) {  // the first turn is group 0's
    if (group == Tile::kConsumers - 1) end_turn();
  }

  for (int round = 0;; ++round) {
    const int tile = tile_of_round(round, blockIdx.x, gridDim.x);
    if (round * static_cast<int>(gridDim.x) >= a.schedule.num_tiles) break;
    if (tile >= a.schedule.num_tiles) continue;
    const FlashTileWork work = work_of_tile<Tile>(a, tile);
    if (work.first_row >= work.num_queries) continue;
    const KeyBlocks tile_blocks = blocks_of_rows<Tile, kMask>(work, work.first_row, Tile::kBlockM);
    const int first_row = work.first_row + group * kGroupRows;
    const int row = first_row + row_in_group;
    const KeyBlocks blocks = blocks_of_rows<Tile, kMask>(work, first_row, kGroupRows);
    const int tile_count = tile_blocks.hi - tile_blocks.lo;
    const bool has_keys = blocks.hi > blocks.lo;

    float r_o[Tile::kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < Tile::kHeadDim / 2; ++i) r_o[i] = 0.0f;
    TwoRows rows{{kNoScore, kNoScore}, {0.0f, 0.0f}};

    if (tile_count > 0) {
      if (p.cu_seqlens_q != nullptr && tile_blocks.hi * kBlockN > work.window.num_keys) {
        // The rows past the sequence's end hold another's values: 0 * NaN is NaN.
        wait_v();
        constexpr int kChunks = kColumnBlockBytes / 16;
        const int first = work.window.num_keys - (tile_blocks.hi - 1) * kBlockN;
        const int bad = (kBlockN - first) * kChunks;
        for (int i = threadIdx.x - kGroupThreads; i < bad * Tile::kColumnBlocks;
             i += Tile::kConsumers * kGroupThreads) {
          const int block = i / bad;
          uint8_t* to = s.v[v_ring.slot] + block * kBlockN * kColumnBlockBytes +
                        first * kColumnBlockBytes + (i - block * bad) * 16;
          *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
        }
        ptx::fence_proxy_async_shared();
        ptx::named_barrier_sync(kTailBarrier, Tile::kConsumers * kGroupThreads);
      }
      ptx::mbarrier_wait(ptx::shared_address(&s.q_full[q_ring.slot]), q_ring.parity);
    }
    if (tile_count > 0 && !has_keys) pass_blocks(tile_count, tile_count - 1);
    if (has_keys) {
      const int num_before = tile_blocks.hi - blocks.hi;
      pass_blocks(num_before, num_before);
      const uint64_t q = ptx::k_major_descriptor(ptx::shared_address(s.q[q_ring.slot]) +
                                                 group * kGroupRows * kColumnBlockBytes);
      const auto k_of = [&] {
        return ptx::k_major_descriptor(ptx::shared_address(s.k[k_ring.slot]));
      };
      const auto v_of = [&] {
        return ptx::mn_major_descriptor(ptx::shared_address(s.v[v_ring.slot]),
                                        kBlockN * kColumnBlockBytes);
      };
      FlashScoreRule rule{p.softmax_scale, p.softcap, 0.0f};
      if (p.alibi_slopes != nullptr) {
        rule.slope = p.alibi_slopes[work.place.index * p.alibi_batch_stride + work.place.head];
      }
      int ends[2];
      int begins[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ends[h] = window_end<kMask>(work.window, row + 8 * h) - column;
        begins[h] = window_begin<kMask>(work.window, row + 8 * h) - column;
      }

      float r_s[kBlockN / 2];
      uint32_t r_p[kBlockN / kDepth][4];
      float keep[2];
      const auto weigh_block = [&](int n, auto masked) {
        if (a.p.shapes_scores) {
          shape_scores<kBlockN>(r_s, rule, work.window.offset + row, n * kBlockN + column);
        }
        if constexpr (decltype(masked)::value) {
          const int block_begins[2] = {begins[0] - n * kBlockN, begins[1] - n * kBlockN};
          const int block_ends[2] = {ends[0] - n * kBlockN, ends[1] - n * kBlockN};
          mask_scores<kMask, kBlockN>(r_s, block_begins, block_ends);
        }
        // A key that is cut must weigh 0, which a polynomial never is.
        constexpr int kPolynomials = decltype(masked)::value ? 0 : Tile::kPolynomials;
        weigh<kBlockN, kPolynomials>(r_s, rows, scale_log2, keep);
      };

      int n = blocks.hi - 1;
      wait_k();
      ptx::wgmma_fence();
      multiply_keys<T, Tile>(r_s, q, k_of());
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(r_s);
      release_k();
      weigh_block(n, std::true_type{});
      pack_weights<T, kBlockN>(r_s, r_p);

      // The scores of block n, beside the values of block n + 1.
      const auto step = [&](auto masked) {
        wait_k();
        begin_turn();
        ptx::wgmma_fence();
        multiply_keys<T, Tile>(r_s, q, k_of());
        wait_v();
        ptx::wgmma_fence();
        multiply_values<T, Tile>(r_o, r_p, v_of());
        end_turn();
        ptx::wgmma_wait<1>();
        ptx::wgmma_hold(r_s);
        release_k();
        weigh_block(n, masked);
        ptx::wgmma_wait<0>();
        ptx::wgmma_hold(r_o);
        release_v();
        pack_weights<T, kBlockN>(r_s, r_p);
        if (__any_sync(0xffffffff, keep[0] != 1.0f || keep[1] != 1.0f)) scale_rows(r_o, keep);
      };
      --n;
      if constexpr (kMask != FlashMask::kFull) {
#pragma unroll 1
        for (const int stop = max(blocks.right_full, blocks.lo); n >= stop; --n) {
          step(std::true_type{});
        }
      }
#pragma unroll 1
      for (const int stop = max(blocks.left_full, blocks.lo); n >= stop; --n) {
        step(std::false_type{});
      }
      if constexpr (kMask == FlashMask::kLocal) {
#pragma unroll 1
        for (; n >= blocks.lo; --n) step(std::true_type{});
      }
      release(s.q_empty[q_ring.slot]);
      wait_v();
      ptx::wgmma_fence();
      multiply_values<T, Tile>(r_o, r_p, v_of());
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(r_o);
      release_v();
      const int num_after = blocks.lo - tile_blocks.lo;
      pass_blocks(num_after, num_after);
    } else if (tile_count > 0) {
      release(s.q_empty[q_ring.slot]);
    }
    if (tile_count > 0) q_ring.advance();
    store_rows<T, Tile>(a, work, row, r_o, rows);
  }
}

template <typename T, typename Tile, FlashMask kMask>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    flash_fwd_sm90_kernel(const __grid_constant__ FlashSm90Args a) {
  extern __shared__ __align__(1024) uint8_t s_bytes[];
  auto& s = *reinterpret_cast<FlashShared<Tile>*>(s_bytes);
  constexpr int kConsumerWarps = Tile::kConsumers * kGroupThreads / 32;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&a.q_map);
    ptx::prefetch_tensor_map(&a.k_map);
    ptx::prefetch_tensor_map(&a.v_map);
    const auto init = [](uint64_t& full, uint64_t& empty) {
      ptx::mbarrier_init(ptx::shared_address(&full), 1);
      ptx::mbarrier_init(ptx::shared_address(&empty), kConsumerWarps);
    };
    for (int i = 0; i < Tile::kQueryStages; ++i) init(s.q_full[i], s.q_empty[i]);
    for (int i = 0; i < Tile::kStages; ++i) init(s.k_full[i], s.k_empty[i]);
    for (int i = 0; i < Tile::kStages; ++i) init(s.v_full[i], s.v_empty[i]);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    ptx::setmaxnreg_dec<Tile::kCopyRegisters>();
    if (threadIdx.x == 0) copy_tiles<Tile, kMask>(a, s);
  } else {
    ptx::setmaxnreg_inc<Tile::kComputeRegisters>();
    compute_tiles<T, Tile, kMask>(a, s);
  }
}

}  // namespace llamatelemetry
