// out = activation(x . W^T + bias), of gates act(gate) * up, each step rounded to T, for few rows
// of x, W [n, k] of codes of four to eight bits (format/layout.h), on tensor cores: bound by
// reading W once.
//
// As in quant_skinny.cuh W is the A operand of mma.m16n8k16 and k is permuted such that a word of a
// packed row is a lane's share of fragments. Here the words go from memory to registers, a ring of
// kDepth items deep, without a stop in shared memory: a lane's share of a block is 8 bytes a word,
// a warp's 256 in one piece. Nibbles become weights that are kBase too large (stream_weights.cuh).
// Their sums start from what that adds to them, -(kBase + zero point) times the sum of x, so each
// product still counts with the code that dequantize has; other codes lose their zero points in
// registers. Scales are applied in float32 to sums over the weights that share one, at most 128. x
// past 1e34 leaves float32's range, and of x that is not finite its rows become NaN.
//
// Against the rule of tile/dependent_launch.cuh the first weights are read before the wait, which
// alone promises to show earlier writes. It rests on the hardware, as tests measure: a grid starts
// when the blocks ahead have ended, or let it start early. None that does so writes packed weights,
// their scales or zero points: codes of quantize_rows are packed by repack, which does not.
//
// A block has the tiles first_tile .. of 16 rows and a range of k, whose x lies in shared memory,
// permuted as the codes are. Gated: tiles of gates, then those of what they multiply, as many.
// Items, 128 weights of a tile, are divided evenly in their order: a warp has consecutive ones,
// ends of tiles or not, so few warps share a tile. Where splits > 1 the blocks of a cluster share k
// and add their sums up through each other's shared memory. Grid [splits, ceil(tiles / tiles of a
// block)], clusters of splits, block kNumThreads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "format/decode.cuh"
#include "gemm/params.h"
#include "gemm/stream_plan.h"
#include "gemm/stream_sides.cuh"
#include "gemm/stream_weights.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared.cuh"
#include "tile/activation.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

struct QuantStreamArgs {
  QuantLinearParams call;
  StreamPlan plan;
  StreamShared shared;
  int num_tiles;   // of W
  int num_chunks;  // of a row
};

// kTokenTiles: eights of rows of x. kScaleRuns: runs of 32 weights with one scale in an item, 1 or
// 4.
template <typename T, int kFormat, int kTokenTiles, int kScaleRuns>
struct QuantStream {
  using Params = QuantStreamArgs;
  using Word = PackedWord<kFormat, 2>;
  static_assert(serves_stream_format(Word::kCodes, Word::kScaleRule));
  static constexpr int kCapability = 80;
  static constexpr int kColumnTiles = kTokenTiles;
  static constexpr int kNumWarps = kStreamWarps;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kMinBlocks = 1;
  static constexpr int kChunk = stream_chunk(Word::kScaleRule);
  static constexpr int kRuns = kChunk / 32;
  static constexpr bool kScalePer16 = has_scale_per_16(Word::kScaleRule);
  static constexpr int kSums = kScalePer16 ? 2 * kRuns : kRuns / kScaleRuns;  // scaled, of an item
  static constexpr int kItemBytes = kChunk / Word::kBlockSize * Word::kPackedBytes;
  static constexpr bool kSuperBlocks = Word::kBlockSize == 256;

  using Weights = StreamWeights<T, Word, kRuns>;
  // Whether sums of x are needed, and what they are multiplied by where they lie.
  static constexpr bool kHasStarts = has_stream_sums(Word::kCodes, Word::kScaleRule);
  static constexpr int kStarts = kHasStarts ? kSums : 0;
  static constexpr float kStartFactor = Weights::kNibbles ? Weights::kBase + Word::kOffset : 1;
  using Sides = std::conditional_t<
      Word::kHasGroups, StreamGroups<kSums, Word::kHasZeros>,
      std::conditional_t<
          kScalePer16, StreamSixteens,
          std::conditional_t<kSuperBlocks, StreamSubBlocks, StreamBlocks<kSums, Word::kHasMin>>>>;
  // An item's share of a lane: rows 2 * group and 2 * group + 1 of a tile.
  struct Item {
    Weights weights;
    Sides sides;
  };
  // 48 to 128 KiB of a multiprocessor are on their way.
  static constexpr int kDepth = kSuperBlocks || Word::kByteCodes ? 2 : kScaleRuns == 1 ? 3 : 4;

  const QuantLinearParams& p;
  const int warp, lane, group, lane_in_group;
  const int rank, splits;
  const int num_tiles;            // of W
  const int num_chunks;           // of a whole row
  const int first_chunk, chunks;  // of this block
  const int first_tile, tiles;    // likewise, of W
  const int items;                // of the block
  const int begin, end;           // of this warp
  const StreamShared& shared;     // where things lie in s_bytes
  char* const s_bytes;
  const int tile_of_begin, chunk_of_begin;  // in the block
  // The item that is loaded next; scales and zeros of its tile.
  const uint8_t* next_words;
  const float* next_scales;
  const uint8_t* next_zeros;
  int next_chunk;

  // Gated: where the block's gates end, and the tiles of W between them and what they multiply.
  struct Gap {
    int item, tiles;
  };

  static __device__ void run(const Params& args) {
    extern __shared__ __align__(128) char s_bytes[];
    let_successors_start();
    QuantStream work(args, s_bytes);
    Item ring[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      work.load_next(ring[i], work.begin + i, [&] { return work.gap(); });
    }
    if (work.lane == 0) work.first_tiles()[work.warp] = work.tile_of_begin;
    if (threadIdx.x == 0) work.share_gap();
    wait_for_predecessors();
    work.stage_tokens();
    __syncthreads();
    work.multiply(ring);
    __syncthreads();
    work.store();
  }

  __device__ QuantStream(const Params& args, char* s_bytes)
      : p(args.call),
        warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        group(threadIdx.x % kWarpSize / 4),
        lane_in_group(threadIdx.x % 4),
        rank(static_cast<int>(blockIdx.x)),
        splits(args.plan.splits),
        num_tiles(args.num_tiles),
        num_chunks(args.num_chunks),
        first_chunk(rank * num_chunks / splits),
        chunks((rank + 1) * num_chunks / splits - first_chunk),
        first_tile(static_cast<int>(blockIdx.y) * args.plan.tiles / (p.gated ? 2 : 1)),
        tiles(p.gated ? min(args.plan.tiles, args.num_tiles - 2 * first_tile)
                      : min(args.plan.tiles, args.num_tiles - first_tile)),
        items(tiles * chunks),
        begin(warp * items / kNumWarps),
        end((warp + 1) * items / kNumWarps),
        shared(args.shared),
        s_bytes(s_bytes),
        tile_of_begin(begin / chunks),
        chunk_of_begin(begin - tile_of_begin * chunks),
        next_chunk(chunk_of_begin) {
    const int64_t tile = first_tile + tile_of_begin + (begin < gap().item ? 0 : gap().tiles);
    // Of this lane: its group's two rows, its own words.
    next_words = p.packed + (tile * num_chunks + first_chunk + next_chunk) * kItemBytes +
                 lane_in_group * 4 * kTileRows;
    if constexpr (Word::kHasGroups) {
      next_scales = p.groups.scales + (tile * p.groups.groups * kTileRows + 2 * group);
    }
    if constexpr (Word::kHasZeros) {
      next_zeros = p.groups.zeros + (tile * p.groups.groups * kTileRows + 2 * group);
    }
  }

  __device__ Gap gap() const {
    if (!p.gated) return {0, 0};
    return {tiles / 2 * chunks, (num_tiles - tiles) / 2};
  }

  // The item-th of the block. gap_of() is gap(), in the loop from shared memory: registers are few.
  template <typename GapOf>
  __device__ void load_next(Item& to, int item, GapOf gap_of) {
    if (item >= end) return;
    to.weights.load(next_words, group);
    if constexpr (Word::kHasGroups) {
      const int first_run = (first_chunk + next_chunk) * kRuns;
      to.sides.load(next_scales, next_zeros, first_run, kScaleRuns, p.groups.shift);
    } else {
      to.sides.template load<Word>(next_words - lane_in_group * 4 * kTileRows, group);
    }
    next_words += kItemBytes;
    if (++next_chunk < chunks) return;
    next_chunk = 0;
    next_words += (num_chunks - chunks) * int64_t{kItemBytes};
    int tiles_on = 1;
    if (p.gated) {
      const Gap gap = gap_of();
      if (item + 1 == gap.item) {
        next_words += gap.tiles * (num_chunks * int64_t{kItemBytes});
        tiles_on += gap.tiles;
      }
    }
    if constexpr (Word::kHasGroups) next_scales += tiles_on * (p.groups.groups * kTileRows);
    if constexpr (Word::kHasZeros) next_zeros += tiles_on * (p.groups.groups * kTileRows);
  }

  // Rows of x in shared memory: for each run of 32 weights and each lane of a group 16 bytes, what
  // its words meet; and what sums start from.
  __device__ void stage_tokens() {
    constexpr int kAtOnce = 4;             // units of a thread whose loads overlap
    const int units = chunks * kRuns * 2;  // of a row: 8 elements and the 8 that lie 16 on
    const int total = static_cast<int>(p.m) * units;
    const uint32_t over_units =
        0xffffffffu / units + 1;  // at * this >> 32 is at / units: both small
    for (int first = 0; first < total; first += kAtOnce * kNumThreads) {
      uint4 low[kAtOnce] = {}, high[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * kNumThreads + static_cast<int>(threadIdx.x);
        if (at >= total) continue;
        const int token = static_cast<int>(__umulhi(at, over_units)), unit = at - token * units;
        const T* from = static_cast<const T*>(p.x) + token * p.x_row_stride +
                        (first_chunk * kChunk + unit / 2 * 32 + unit % 2 * 8);
        low[i] = *reinterpret_cast<const uint4*>(from);
        high[i] = *reinterpret_cast<const uint4*>(from + 16);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * kNumThreads + warp * kWarpSize >= total) break;
        const int at = first + i * kNumThreads + static_cast<int>(threadIdx.x);
        const int token = static_cast<int>(__umulhi(at, over_units));
        stage_unit(token, at - token * units, low[i], high[i]);
      }
    }
  }
  __device__ void stage_unit(int token, int unit, const uint4& low, const uint4& high) {
    float sum = sum_two(low.x) + sum_two(low.y) + (sum_two(low.z) + sum_two(low.w)) +
                (sum_two(high.x) + sum_two(high.y) + (sum_two(high.z) + sum_two(high.w)));
#pragma unroll
    for (int offset = 1; kHasStarts && offset < 2 * kScaleRuns; offset *= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, offset);
    }
    if (token >= p.m) return;
    auto* to = reinterpret_cast<uint4*>(s_bytes + token * shared.token_bytes + unit * 32);
    to[0] = permuted(low.x, low.y, high.x, high.y);
    to[1] = permuted(low.z, low.w, high.z, high.w);
    if (kHasStarts && unit % (2 * kScaleRuns) == 0) {
      auto* starts = reinterpret_cast<float*>(s_bytes + shared.starts);
      const int column = (token / 8 * chunks * kSums + unit / (2 * kScaleRuns)) * 16 +
                         token % 8 / 2 * 4 + token % 2;
      starts[column] = starts[column + 2] = -kStartFactor * sum;
    }
  }
  // Elements 0 and 2, 1 and 3 of four in a group of 16 weights, then of those 16 on.
  static __device__ uint4 permuted(uint32_t low0, uint32_t low1, uint32_t high0, uint32_t high1) {
    return {__byte_perm(low0, low1, 0x5410), __byte_perm(low0, low1, 0x7632),
            __byte_perm(high0, high1, 0x5410), __byte_perm(high0, high1, 0x7632)};
  }
  static __device__ float sum_two(uint32_t two) {
    const T* pair = reinterpret_cast<const T*>(&two);
    return to_float(pair[0]) + to_float(pair[1]);
  }

  using Sums = float[kTokenTiles][4];

  __device__ void multiply(Item (&ring)[kDepth]) {
    Sums sums = {};
    int slot = 0, chunk = chunk_of_begin;
    for (int item = begin; item < end; item += kDepth) {
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        if (item + i >= end) break;
        multiply_item(ring[i], chunk, sums);
        load_next(ring[i], item + i + kDepth, [&] { return shared_gap(); });
        if (++chunk == chunks) {
          keep_sums(sums, slot++);
          chunk = 0;
        }
      }
    }
    if (chunk != 0 && begin < end) keep_sums(sums, slot);
  }

  __device__ void multiply_item(const Item& item, int chunk, Sums& sums) const {
    const char* starts = s_bytes + shared.starts + (chunk * kSums * 4 + lane_in_group) * 16;
    float start[kTokenTiles][4], products[kTokenTiles][4];
    const auto scales = item.sides.decoded();
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int i = run / kScaleRuns;
      uint32_t a[2][4];
      item.weights.fragments(run, a);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const uint4 x = tokens_of(n, chunk * kRuns + run);
        if (kHasStarts && run % kScaleRuns == 0) {
          const float4 four =
              *reinterpret_cast<const float4*>(starts + (n * chunks * kSums + i) * 64);
          start[n][0] = four.x, start[n][1] = four.y, start[n][2] = four.z, start[n][3] = four.w;
        }
        constexpr float kZeros[4] = {};
        if (run % kScaleRuns != 0) {
          ptx::mma_m16n8k16(products[n], a[0], x.x, x.y, products[n], T{});
        } else if constexpr (Weights::kNibbles) {
          ptx::mma_m16n8k16(products[n], a[0], x.x, x.y, start[n], T{});
        } else {
          ptx::mma_m16n8k16(products[n], a[0], x.x, x.y, kZeros, T{});
        }
        if constexpr (kScalePer16) {
          add_scaled(scales, 2 * run, start[n], products[n], sums[n]);
          ptx::mma_m16n8k16(products[n], a[1], x.z, x.w, kZeros, T{});
          add_scaled(scales, 2 * run + 1, start[n], products[n], sums[n]);
        } else {
          ptx::mma_m16n8k16(products[n], a[1], x.z, x.w, products[n], T{});
          if (run % kScaleRuns == kScaleRuns - 1) {
            add_scaled(scales, i, start[n], products[n], sums[n]);
          }
        }
      }
    }
  }

  __device__ uint4 tokens_of(int n, int run) const {
    const int token = 8 * n + group;
    const int row = token < p.m ? token : 0;  // columns past m are not stored
    return *reinterpret_cast<const uint4*>(s_bytes + row * shared.token_bytes + run * 64 +
                                           lane_in_group * 16);
  }

  // start is -kStartFactor, a power of two where it is used here, times the sum of x.
  template <typename Scales>
  static __device__ void add_scaled(const Scales& scales, int i, const float (&start)[4],
                                    const float (&products)[4], float (&sums)[4]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float scale = scales.scale(i, row);
#pragma unroll
      for (int e = 2 * row; e < 2 * row + 2; ++e) {
        float product = products[e];
        if constexpr (Word::kHasZeros) {
          product = fmaf(scales.zero(i, row) * (1.0f / kStartFactor), start[e], product);
        }
        sums[e] = fmaf(scale, product, sums[e]);
        if constexpr (Word::kHasMin) {
          sums[e] = fmaf(scales.min(i, row) * (1.0f / kStartFactor), start[e], sums[e]);
        }
      }
    }
  }

  // Of a tile that this warp has done with, its slot-th: [m][16] floats. Sums are 0 again.
  __device__ void keep_sums(Sums& sums, int slot) const {
    float* to = sums_of(warp, slot);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = 8 * n + 2 * lane_in_group + e;
        if (token < p.m) {
          *reinterpret_cast<float2*>(to + token * kTileRows + 2 * group) =
              float2{sums[n][e], sums[n][2 + e]};
        }
        sums[n][e] = sums[n][2 + e] = 0;
      }
    }
  }
  __device__ float* sums_of(int of_warp, int slot) const {
    return reinterpret_cast<float*>(s_bytes + shared.sums) +
           (of_warp * shared.slots + slot) * static_cast<int>(p.m) * kTileRows;
  }

  __device__ int* first_tiles() const {  // of the warps
    return reinterpret_cast<int*>(s_bytes + shared.first_tiles);
  }
  __device__ void share_gap() const {
    first_tiles()[kNumWarps] = gap().item;
    first_tiles()[kNumWarps + 1] = gap().tiles;
  }
  __device__ Gap shared_gap() const {
    // volatile: else the compiler loads it before the loop and keeps it in registers.
    const volatile int* gap = first_tiles() + kNumWarps;
    return {gap[0], gap[1]};
  }

  // Adds the warps' sums of each tile up, in their order, and then those of the cluster's blocks.
  __device__ void store() const {
    const int of_tile = static_cast<int>(p.m) * kTileRows;
    const int out_tiles = p.gated ? tiles / 2 : tiles;
    const int up = p.gated ? out_tiles * of_tile : 0;  // from a gate's sum to what it multiplies
    if (splits == 1) {
      for (int i = threadIdx.x; i < out_tiles * of_tile; i += kNumThreads) {
        store_sum(i, of_tile, total(i, of_tile), p.gated ? total(i + up, of_tile) : 0.0f);
      }
      return;
    }
    auto* totals = reinterpret_cast<float*>(s_bytes + shared.totals);
    for (int i = threadIdx.x; i < tiles * of_tile; i += kNumThreads) totals[i] = total(i, of_tile);
    ptx::cluster_sync();
    for (int i = threadIdx.x; i < out_tiles * of_tile / 4; i += kNumThreads) {
      if (i % splits != rank) continue;
      const float4 sums = total_of_cluster(totals + 4 * i);
      const float4 factors = p.gated ? total_of_cluster(totals + 4 * i + up) : float4{};
      store_sum(4 * i, of_tile, sums.x, factors.x);
      store_sum(4 * i + 1, of_tile, sums.y, factors.y);
      store_sum(4 * i + 2, of_tile, sums.z, factors.z);
      store_sum(4 * i + 3, of_tile, sums.w, factors.w);
    }
    ptx::cluster_sync();  // nobody leaves while its sums are read
  }
  // i: of a tile of the block, a row of x and a row of the tile.
  __device__ float total(int i, int of_tile) const {
    const int tile = i / of_tile, place = i % of_tile;
    const int first = tile * chunks, last = first + chunks - 1;
    const int last_warp = ((last + 1) * kNumWarps - 1) / items;
    float total = 0;
    for (int w = ((first + 1) * kNumWarps - 1) / items; w <= last_warp; ++w) {
      if (w * items / kNumWarps == (w + 1) * items / kNumWarps) continue;  // has no item
      total += sums_of(w, tile - first_tiles()[w])[place];
    }
    return total;
  }
  __device__ float4 total_of_cluster(const float* four) const {
    float4 total{};
    for (int r = 0; r < splits; ++r) {
      const float4 part = ptx::load_cluster(ptx::cluster_address(ptx::shared_address(four), r));
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    return total;
  }

  // up: the sum that a gate's, total, multiplies.
  __device__ void store_sum(int i, int of_tile, float total, float up) const {
    const int tile = i / of_tile, place = i % of_tile;
    const int64_t out_n = p.gated ? p.n / 2 : p.n;
    const int64_t column = int64_t{first_tile + tile} * kTileRows + place % kTileRows;
    if (column >= out_n) return;
    T y = with_bias(total, column);
    if (p.activation != Activation::kNone) {
      y = from_float<T>(activated(p.activation, to_float(y)));
    }
    if (p.gated) y = from_float<T>(to_float(y) * to_float(with_bias(up, out_n + column)));
    static_cast<T*>(p.out)[place / kTileRows * out_n + column] = y;
  }
  __device__ T with_bias(float total, int64_t column) const {
    if (p.bias != nullptr) total += to_float(static_cast<const T*>(p.bias)[column]);
    return from_float<T>(total);
  }
};

}  // namespace llamatelemetry
