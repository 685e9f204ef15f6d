// out[i] = sum_j softmax_j(softmax_scale * q[i] . k[j]) v[j] for few queries a sequence over many
// keys, dense or in pages: bound by reading keys and values once. (Flash-Decoding: Dao et al. 2023)
//
// Query heads that share a key head, of all queries of a sequence, are the 16 rows of
// mma.m16n8k16. Each of four warps takes 16 keys of a tile of 64, through its own ring of stages
// filled by cp.async, with its own online softmax, so tiles need no barrier. (Compute capability
// 7.5: two of m16n8k8, one stage, filled through registers.) Of more rows (wide
// tiles, config.h) each warp takes 16, and all read the keys of all, behind a barrier a tile. Pages
// are looked up a tile ahead. Rows of keys and values that no query sees are never read. Grid: as
// many blocks as the GPU holds at once; plan.cuh and segment_parts.cuh say what each does. One
// sequence on Hopper has a kernel of its own: cluster.cuh.
#pragma once

#include <type_traits>

#include "attention/decode/keys_16_bit.cuh"
#include "attention/decode/keys_8_bit.cuh"
#include "attention/decode/loader.cuh"
#include "attention/decode/merge.cuh"
#include "attention/decode/segment_parts.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/convert.cuh"
#include "tile/dependent_launch.cuh"

namespace llamatelemetry::decode {

// What two rows of a lane's fragments, group and group + 8, need beside their queries.
struct RowRules {
  int begin[2], end[2];  // keys they see
  float slope[2];        // ALiBi, in log2 units
  int position[2];       // among the keys
};
// What a warp knows of the same two rows.
struct RowStats {
  float max[2] = {-INFINITY, -INFINITY};  // of their scores, in log2 units
  float sum[2] = {};                      // of weights against it, of this lane's keys
  // Where values have scales: what o is exponentiated against, the largest of scores times those.
  float reference[2] = {-INFINITY, -INFINITY};
};

// A warp's keys of a tile, and the first of them.
template <typename Stage>
struct KeysAt {
  const Stage* stage;
  int first;
};

template <typename T, Config kConfig, bool kFixed>
struct Decode {
  using Params = AttentionParams;
  using Merge = Merging<T, kConfig, kFixed>;
  using Sequence = decode::Sequence<kFixed, kConfig.row_tile>;
  using Keys = std::conditional_t<kConfig.is_8_bit(), Keys8Bit<T, kConfig>, Keys16Bit<T, kConfig>>;
  using Element = typename Keys::Element;
  using Stage = typename Keys::Stage;
  using At = KeysAt<Stage>;
  using Scales = typename Keys::Scales;
  using Loader = decode::Loader<Keys>;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kCapability = kConfig.capability;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kMinBlocks = kConfig.blocks_per_sm;
  // Where that has been measured.
  static constexpr bool kHasLanes = !kFixed && !kConfig.is_wide() && !kConfig.copies_by_registers();
  static constexpr bool kCutsSegments = !kFixed && !kConfig.is_wide();  // segment_parts.cuh
  static constexpr int kDimSteps = kHeadDim / 16;
  // Of a warp's ring: two small ones overlap; two of 128 columns spill.
  static constexpr int kTilesAtOnce = Keys::kHasScales && kHeadDim <= 64 ? 2 : 1;
  static __device__ int wrapped(int stage) { return stage >= kStages ? stage - kStages : stage; }

  struct alignas(128) Shared {
    union {
      Stage stages[kNumWarps][kStages];
      typename Merge::Shared merge;
    };
    alignas(16) char queries[std::max(1, kConfig.query_bytes())];
  };
  static constexpr int kSharedBytes = sizeof(Shared);

  static __device__ int warp() { return threadIdx.x / kWarpSize; }
  static __device__ int lane() { return threadIdx.x % kWarpSize; }

  static __device__ void run(const Params& p) {
    extern __shared__ __align__(128) char s_bytes[];
    attend_units<Decode>(p, *reinterpret_cast<Shared*>(s_bytes));
  }

  // What the plan gives this block. Kernel: this one, or warpgroup.cuh's, which attends tiles and
  // combines parts in its own way.
  template <typename Kernel>
  static __device__ void attend_units(const Params& p, typename Kernel::Shared& shared) {
    let_successors_start();
    SegmentPart part{.exists = false};
    if constexpr (!Kernel::kCutsSegments) {
      wait_for_predecessors();
    } else {
      part = wait_for_part<kConfig, kNumThreads, Element>(p);
    }
    if (part.exists && part.is_idle) return;
    const Lanes lanes(p, kHasLanes);
    Runs runs;
    int index, begin, end;
    int first_unit;  // of the sequence, among all; of a part among its own
    if (part.exists) {
      index = part.index;
      first_unit = 0;
      begin = part.which * part.num_tiles + part.tiles.begin;
      end = part.which * part.num_tiles + part.tiles.end;
    } else {
      const Plan<kFixed, kConfig.row_tile> plan(p, lanes.count);
      const int total = plan.total_units();
      runs = Runs(total, lanes.num_groups(),
                  kFixed ? 1 : shortest_run(total, p.plan.num_sms / lanes.count));
      if (lanes.group >= runs.num_runs) return;
      begin = runs.first_of(lanes.group);
      end = runs.first_of(lanes.group + 1);
      if (begin >= end) return;
      index = plan.find(end - 1, &first_unit);
    }
    // The pieces of a run in reverse: the one that later blocks wait for comes first, the one that
    // waits for earlier blocks last.
    while (true) {
      const Sequence sequence(p, index);
      while (end > begin && end > first_unit) {
        const int which = (end - 1 - first_unit) / sequence.units;
        const int segment_begin = first_unit + which * sequence.units;
        const int from = max(begin, segment_begin);
        const Segment segment = part.exists ? Segment(p, sequence, which, 1, 0)
                                            : Segment(p, sequence, which, lanes.count, lanes.own);
        const typename Kernel::Merge merge{p,       sequence,     index,
                                           segment, shared.merge, part.exists ? 1 : lanes.count};
        const auto block_of = [&](int unit) {
          if (part.exists) return unit == 0 ? part.first_block : part.last_block;
          return lanes.block_of(runs.block_of(segment_begin + unit));
        };
        attend_piece<Kernel>(merge, block_of, from - segment_begin, end - segment_begin, shared);
        __syncthreads();  // the stages are free again
        end = from;
      }
      if (end == begin) return;
      do {
        --index;
        first_unit -= Sequence(p, index).work(p, lanes.count);
      } while (first_unit == end);
    }
  }

  // Up to a block a multiprocessor runs stay as short as they can, beyond that kLongestShortRun
  // before there are more blocks: more parts take longer to combine than so many tiles to read.
  // total: a lane's units. num_sms: its share of the multiprocessors.
  static __device__ int shortest_run(int total, int num_sms) {
    return max(1, min(total / max(1, num_sms), kLongestShortRun));
  }

  // Units [from, end) of a segment. block_of(unit): whose it is.
  template <typename Kernel, typename BlockOf>
  static __device__ void attend_piece(const typename Kernel::Merge& merge, const BlockOf& block_of,
                                      int from, int end, typename Kernel::Shared& shared) {
    const int num_units = merge.s.units;
    const int block = blockIdx.x;
    const int last_block = block_of(num_units - 1);
    if constexpr (kFixed) {
      for (int unit = end - 1; unit >= from; --unit) {
        const TileRange tiles = merge.s.tiles_of(unit);
        Kernel::attend(merge, tiles.begin, tiles.end - tiles.begin, shared);
        if (num_units == 1) return merge.finish();
        merge.leave_part(unit);
        __syncthreads();  // the stages are free again
      }
      block == last_block ? merge.combine(block_of) : merge.announce();
    } else {
      Kernel::attend(merge, from, end - from, shared);
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

  // ---- Queries ----

  // A row of this warp's, or nullptr.
  static __device__ const T* query_of_warp(const Merge& merge, int row_of_warp) {
    const int row = Merge::first_row_of_warp() + row_of_warp;
    return row < merge.segment.num_rows ? query_of(merge, row) : nullptr;
  }
  static __device__ const T* query_of(const Merge& merge, int row) {
    const Params& p = merge.p;
    return static_cast<const T*>(p.q.data) + merge.index * p.q.batch_stride +
           (merge.s.first_query + merge.segment.query(row)) * p.q.token_stride +
           merge.segment.head(row) * p.q.head_stride;
  }

  // end: of the keys that this block attends.
  static __device__ RowRules rules_of(const Params& p, const Sequence& s, int index,
                                      const Segment& segment, int end) {
    RowRules rules;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(Merge::first_row_of_warp() + lane() / 4 + 8 * half, segment.num_rows - 1);
      const int query = segment.query(row);
      const KeyRange keys = s.keys_of(p, query);
      rules.begin[half] = static_cast<int>(keys.begin);
      rules.end[half] = static_cast<int>(keys.end);
      if constexpr (kTilesAtOnce > 1) rules.end[half] = min(rules.end[half], end);
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
    Stage* stages = shared.stages[warp()];
    const int first_key = (s.begin / kTileKeys + tile) * kTileKeys;
    // Of two tiles at once the second may be past the run: its keys are another block's.
    const int end = min(s.end, first_key + num_tiles * kTileKeys);
    Loader loader(p, merge.index, merge.segment.kv_head, s.first_key, first_key, {s.begin, end});
    loader.find_page();
    typename Loader::Held held;  // where copies go through registers
    if constexpr (kConfig.copies_by_registers()) {
      loader.fetch_keys(held);
    } else {
#pragma unroll
      for (int i = 0; i < kStages - kTilesAtOnce; ++i) {
        i < num_tiles || kTilesAtOnce > 1 ? loader.load(stages[i]) : ptx::cp_async_commit();
      }
    }
    typename Keys::Queries q;
    Keys::load_queries([&](int row) { return query_of_warp(merge, row); },
                       static_cast<int>(p.head_dim), shared.queries, q);
    const RowRules rules = rules_of(p, s, merge.index, merge.segment, end);
    float o[2 * kDimSteps][4] = {};
    RowStats rows;
    // Keys of several stages at once, so that their products and exponentials overlap.
    const auto add_keys = [&](const auto& before_values, const auto&... keys) {
      constexpr int kCount = sizeof...(keys);
      const At at[kCount] = {keys...};
      float scores[kCount][2][4] = {};
      Scales scales[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        scales[j] = Keys::multiply_keys(q, *at[j].stage, scores[j]);
      }
      if (has_score_terms(p)) {
        exponentiate<true>(p, scores, at, rules, scales, rows, o);
      } else {
        exponentiate<false>(p, scores, at, rules, scales, rows, o);
      }
      before_values();
#pragma unroll
      for (int j = 0; j < kCount; ++j) Keys::multiply_values(scores[j], *at[j].stage, o);
    };
    if constexpr (kConfig.copies_by_registers()) {
      take_turns(loader, held, stages[0], first_key, num_tiles, add_keys);
    } else {
      go_round(merge, loader, shared, first_key, num_tiles, add_keys);
    }
    __syncthreads();
    to_reference_of_sums(rows, o);
    merge.template leave_warp<Keys>(o, rows.max, rows.sum);
    __syncthreads();
  }

  // The tiles through the ring of stages. add_keys(what comes before their values, keys...).
  template <typename AddKeys>
  static __device__ void go_round(const Merge& merge, Loader& loader, Shared& shared, int first_key,
                                  int num_tiles, const AddKeys& add_keys) {
    Stage* stages = shared.stages[warp()];
    const auto nothing = [] {};
    int stage = 0;
    for (int i = 0; i < num_tiles; i += kTilesAtOnce) {
      const int key = first_key + i * kTileKeys;
      if constexpr (kTilesAtOnce == 2) {
        __syncwarp();  // nobody reads the two stages before any more
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          Stage& free = stages[wrapped(stage + kStages - 2 + j)];
          i + kStages - 2 < num_tiles ? loader.load(free) : ptx::cp_async_commit();
        }
        ptx::cp_async_wait<kStages - 2>();
        __syncwarp();  // all lanes' copies are there
        add_keys(nothing, At{&stages[stage], key + warp() * kWarpKeys},
                 At{&stages[wrapped(stage + 1)], key + warp() * kWarpKeys + kTileKeys});
      } else {
        ptx::cp_async_wait<kStages - 2>();
        // The copies are there, and nobody reads the stage before any more: of the warp, or of all.
        if constexpr (kConfig.is_wide()) {
          __syncthreads();
        } else {
          __syncwarp();
        }
        Stage& free = stages[wrapped(stage + kStages - 1)];
        i + kStages - 1 < num_tiles ? loader.load(free) : ptx::cp_async_commit();
        if constexpr (kConfig.is_wide()) {
          if (Merge::first_row_of_warp() < merge.segment.num_rows) {
#pragma unroll 1
            for (int w = 0; w < kNumWarps; w += 2) {
              add_keys(nothing, At{&shared.stages[w][stage], key + w * kWarpKeys},
                       At{&shared.stages[w + 1][stage], key + (w + 1) * kWarpKeys});
            }
          }
        } else {
          add_keys(nothing, At{&stages[stage], key + warp() * kWarpKeys});
        }
      }
      stage = wrapped(stage + kTilesAtOnce);
    }
    ptx::cp_async_wait<0>();
  }

  // The tiles through registers: a warp's keys and values take turns in its one stage, and what
  // comes next is on its way to registers during the product of what is there.
  template <typename AddKeys>
  static __device__ void take_turns(Loader& loader, typename Loader::Held& held, Stage& stage,
                                    int first_key, int num_tiles, const AddKeys& add_keys) {
    const auto bring_values = [&] {
      __syncwarp();  // nobody reads the keys any more
      loader.store_values(held, stage.v);
      loader.fetch_keys(held);  // past the last tile zeros, and no reads
      __syncwarp();
    };
    for (int i = 0; i < num_tiles; ++i) {
      loader.store_keys(held, stage.k);
      loader.fetch_values(held);
      __syncwarp();
      add_keys(bring_values, At{&stage, first_key + i * kTileKeys + warp() * kWarpKeys});
      __syncwarp();  // nobody reads the values any more
    }
  }

  // Where values have scales, from o's reference to that of the sums.
  static __device__ void to_reference_of_sums(const RowStats& rows, float (&o)[2 * kDimSteps][4]) {
    if constexpr (Keys::kHasScales) {
      const float factor[2] = {
          ptx::exp2_approx(finite_or_zero(rows.reference[0]) - finite_or_zero(rows.max[0])),
          ptx::exp2_approx(finite_or_zero(rows.reference[1]) - finite_or_zero(rows.max[1]))};
      scale_rows(factor, o);
    }
  }

  static __device__ void scale_rows(const float (&factor)[2], float (&o)[2 * kDimSteps][4]) {
#pragma unroll
    for (int t = 0; t < 2 * kDimSteps; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[t][e] *= factor[e / 2];
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

  // Online softmax over 16 keys of each stage: scores to weights, which take the values' scales
  // along; o is rescaled where what it is exponentiated against grew.
  template <bool kScoreTerms, int kCount>
  static __device__ void exponentiate(const Params& p, float (&x)[kCount][2][4],
                                      const At (&at)[kCount], const RowRules& rules,
                                      const Scales (&scales)[kCount], RowStats& rows,
                                      float (&o)[2 * kDimSteps][4]) {
    const float scale = p.softmax_scale * kLog2E;
    float rescale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float row_max = rows.max[half];
      float largest = rows.reference[half];
#pragma unroll
      for (int i = 0; i < 4 * kCount; ++i) {
        const int j = i / 4, t = i / 2 % 2, e = i % 2;
        float& score = x[j][t][2 * half + e];
        const int key = at[j].first + 8 * t + lane() % 4 * 2 + e;
        const bool seen = key >= rules.begin[half] && key < rules.end[half];
        if constexpr (kScoreTerms) {
          score = score_of(p, score, key, rules.slope[half], rules.position[half]);
        } else {
          score *= scale;
        }
        if (!seen) score = -INFINITY;
        row_max = fmaxf(row_max, score);
        if constexpr (Keys::kHasScales) {
          largest = fmaxf(largest, score + scales[j].exponent[t][e]);
        }
      }
      row_max = warp_reduce<Max, 4>(row_max);
      const float reference = finite_or_zero(row_max);
      rescale[half] = ptx::exp2_approx(rows.max[half] - reference);
      rows.max[half] = row_max;
      rows.sum[half] *= rescale[half];
      float weight_factor = 1.0f;
      if constexpr (Keys::kHasScales) {
        largest = warp_reduce<Max, 4>(largest);
        rescale[half] = ptx::exp2_approx(rows.reference[half] - finite_or_zero(largest));
        rows.reference[half] = largest;
        weight_factor = ptx::exp2_approx(reference - finite_or_zero(largest));
      }
#pragma unroll
      for (int i = 0; i < 4 * kCount; ++i) {
        const int j = i / 4, t = i / 2 % 2, e = i % 2;
        float& score = x[j][t][2 * half + e];
        score = ptx::exp2_approx(score - reference);
        rows.sum[half] += score;
        if constexpr (Keys::kHasScales) score *= scales[j].value[t][e] * weight_factor;
      }
    }
    if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) scale_rows(rescale, o);
  }
};

}  // namespace llamatelemetry::decode
