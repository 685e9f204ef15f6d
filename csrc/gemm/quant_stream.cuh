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
// registers. Where codes name one of 16 values a byte of two is looked up in shared memory, in a
// table of pairs that each bank has a copy of. Scales are applied in float32 to sums over the
// weights that share one, at most 128. x past 1e34 leaves float32's range, and of x that is not
// finite its rows become NaN.
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
  int num_tiles;         // of W
  int num_chunks;        // of a row
  uint32_t over_chunks;  // the high half of a product with it is over num_chunks; or 0
  uint32_t over_tile;    // likewise by the fours of sums of a tile
  StreamTable table;
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
  static constexpr int kTableBytes = stream_table_bytes(Word::kCodes);

  using Weights = StreamWeights<T, Word, kRuns>;
  // Whether sums of x are needed, and what they are multiplied by where they lie.
  static constexpr bool kHasStarts = has_stream_sums(Word::kCodes, Word::kScaleRule);
  static constexpr int kStarts = kHasStarts ? kSums : 0;
  static constexpr float kStartFactor = Weights::kNibbles ? Weights::kBase + Word::kOffset : 1;
  using Sides = std::conditional_t<
      Word::kHasGroups, StreamGroups<kSums, Word::kHasZeros>,
      std::conditional_t<
          kScalePer16, StreamSixteens,
          std::conditional_t<
              Word::kScaleRule == ScaleRule::kExponent, StreamExponents<kSums>,
              std::conditional_t<Word::kScaleRule == ScaleRule::kSubBlock32Six, StreamSixes,
                                 std::conditional_t<kSuperBlocks, StreamSubBlocks,
                                                    StreamBlocks<kSums, Word::kHasMin>>>>>>;
  // An item's share of a lane: rows 2 * group and 2 * group + 1 of a tile.
  struct Item {
    Weights weights;
    Sides sides;
  };
  // Whether products of the first and the last 16 weights of a run have sums of their own: a chain
  // half as long. Of two eights of rows those of one fill the waits of the other.
  static constexpr bool kTwoChains = kTokenTiles == 1 && kScaleRuns > 1;
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
  const StreamTable& table;
  char* const s_bytes;
  const uint32_t& over_tile;
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
    work.share_warps();
    if constexpr (Weights::kTable) work.stage_table();
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
        first_chunk(splits == 1 ? 0 : rank * num_chunks / splits),
        chunks(splits == 1 ? num_chunks : (rank + 1) * num_chunks / splits - first_chunk),
        first_tile(static_cast<int>(blockIdx.y) * args.plan.tiles >> (p.gated ? 1 : 0)),
        tiles(p.gated ? min(args.plan.tiles, args.num_tiles - 2 * first_tile)
                      : min(args.plan.tiles, args.num_tiles - first_tile)),
        items(tiles * chunks),
        begin(warp * items / kNumWarps),
        end((warp + 1) * items / kNumWarps),
        shared(args.shared),
        table(args.table),
        s_bytes(s_bytes),
        over_tile(args.over_tile),
        tile_of_begin(args.over_chunks != 0 ? divided(begin, args.over_chunks) : begin / chunks),
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

  // The pair of each byte, in 32 banks.
  __device__ void stage_table() const {
    constexpr int kVectors = kStreamPairBytes / sizeof(uint4);
#pragma unroll
    for (int first = 0; first < kTableBytes / static_cast<int>(sizeof(uint4));
         first += kNumThreads) {
      const int at = first + static_cast<int>(threadIdx.x), byte = at / kVectors;
      const uint32_t pair = pack_two(table.values[byte % 16], table.values[byte / 16], T{});
      reinterpret_cast<uint4*>(s_bytes)[at] = {pair, pair, pair, pair};
    }
  }

  // Rows of x in shared memory: for each run of 32 weights and each lane of a group 16 bytes, what
  // its words meet; and what sums start from. The lanes of a group have a segment of a row.
  __device__ void stage_tokens() {
    constexpr int kParts = kHasStarts && kScaleRuns == 4 ? 2 : 1;  // of 64 elements
    // Segments of a lane whose loads overlap: as many as registers hold beside the first items.
    constexpr int kAtOnce = kParts == 2 ? 2 : 3;
    const int segments = chunks * kRuns / (2 * kParts), total = static_cast<int>(p.m) * segments;
    const uint32_t over_segments =
        0xffffffffu / segments + 1;  // at * this >> 32 is at / segments: both small
    const auto token_of = [&](int at) {
      return segments == 1 ? at : static_cast<int>(__umulhi(at, over_segments));
    };
    for (int first = 8 * warp; first < total; first += kAtOnce * 8 * kNumWarps) {
      uint4 low[kAtOnce * kParts] = {}, high[kAtOnce * kParts] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * 8 * kNumWarps + group;
        if (at >= total) continue;
        const int token = token_of(at), segment = at - token * segments;
        const T* from = static_cast<const T*>(p.x) + token * p.x_row_stride + first_chunk * kChunk +
                        segment * (kParts * 64) + lane_in_group / 2 * 32 + lane_in_group % 2 * 8;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          low[i * kParts + part] = *reinterpret_cast<const uint4*>(from + part * 64);
          high[i * kParts + part] = *reinterpret_cast<const uint4*>(from + part * 64 + 16);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * 8 * kNumWarps >= total) break;
        const int at = first + i * 8 * kNumWarps + group;
        const int token = token_of(at), segment = at - token * segments;
        float sums[4] = {};
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const uint4 &l = low[i * kParts + part], &h = high[i * kParts + part];
          if (kHasStarts) add_to_starts(l, h, sums);
          if (at < total) stage_unit(token, (segment * kParts + part) * 4 + lane_in_group, l, h);
        }
        if (kHasStarts && at < total) stage_starts(token, segment, sums);
      }
    }
  }
  // Groups in turns begin with either half, so that 8 lanes store to different banks.
  __device__ void stage_unit(int token, int unit, const uint4& low, const uint4& high) {
    char* to = s_bytes + kTableBytes + token * shared.token_bytes + unit * 32;
    const uint4 front = permuted(low.x, low.y, high.x, high.y);
    const uint4 back = permuted(low.z, low.w, high.z, high.w);
    const bool odd = group % 2 != 0;
    *reinterpret_cast<uint4*>(to + (odd ? 16 : 0)) = odd ? back : front;
    *reinterpret_cast<uint4*>(to + (odd ? 0 : 16)) = odd ? front : back;
  }
  // By tensor cores: the elements of a group's lanes are two rows of A, B is -kStartFactor. Where
  // each run has a sum, the even columns of B are of the first two lanes' and the odd ones of the
  // others'.
  __device__ void add_to_starts(const uint4& low, const uint4& high, float (&sums)[4]) const {
    const T factor = from_float<T>(-kStartFactor);
    const bool counts = kScaleRuns != 1 || lane_in_group / 2 == group % 2;
    const uint32_t b = counts ? reinterpret_cast<const uint16_t&>(factor) * 0x10001u : 0;
    const uint32_t first[4] = {low.x, low.y, low.z, low.w};
    const uint32_t last[4] = {high.x, high.y, high.z, high.w};
    ptx::mma_m16n8k16(sums, first, b, b, sums, T{});
    ptx::mma_m16n8k16(sums, last, b, b, sums, T{});
  }
  __device__ void stage_starts(int token, int segment, const float (&sums)[4]) const {
    constexpr bool kOfRuns = kScaleRuns == 1;
    if (!kOfRuns && lane_in_group >= 2) return;
    const int run = kOfRuns ? lane_in_group / 2 : 0;
    const int sum = kOfRuns ? 2 * segment + run : segment;
    auto* starts = reinterpret_cast<float*>(s_bytes + shared.starts);
    starts[(token / 8 * chunks * kSums + sum) * 16 + token % 8 / 2 * 4 + token % 2 +
           lane_in_group % 2 * 2] = run == 0 ? sums[0] + sums[2] : sums[1] + sums[3];
  }
  // Elements 0 and 2, 1 and 3 of four in a group of 16 weights, then of those 16 on; by a table
  // each of the four with the one 16 on, as the nibbles of a byte are.
  static __device__ uint4 permuted(uint32_t low0, uint32_t low1, uint32_t high0, uint32_t high1) {
    if constexpr (Weights::kTable) {
      return {__byte_perm(low0, high0, 0x5410), __byte_perm(low0, high0, 0x7632),
              __byte_perm(low1, high1, 0x5410), __byte_perm(low1, high1, 0x7632)};
    }
    return {__byte_perm(low0, low1, 0x5410), __byte_perm(low0, low1, 0x7632),
            __byte_perm(high0, high1, 0x5410), __byte_perm(high0, high1, 0x7632)};
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
    float start[kTokenTiles][4], products[kTokenTiles][4], others[4];
    const auto scales = item.sides.decoded();
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int i = run / kScaleRuns;
      uint32_t a[2][4];
      item.weights.fragments(run, s_bytes + lane * 4, a);
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
          continue;
        }
        if constexpr (!kTwoChains) {
          ptx::mma_m16n8k16(products[n], a[1], x.z, x.w, products[n], T{});
        } else if (run % kScaleRuns == 0) {
          ptx::mma_m16n8k16(others, a[1], x.z, x.w, kZeros, T{});
        } else {
          ptx::mma_m16n8k16(others, a[1], x.z, x.w, others, T{});
        }
        if (run % kScaleRuns != kScaleRuns - 1) continue;
        if constexpr (kTwoChains) {
#pragma unroll
          for (int e = 0; e < 4; ++e) products[n][e] += others[e];
        }
        add_scaled(scales, i, start[n], products[n], sums[n]);
      }
    }
  }

  __device__ uint4 tokens_of(int n, int run) const {
    const int token = 8 * n + group;
    const int row = token < p.m ? token : 0;  // columns past m are not stored
    return *reinterpret_cast<const uint4*>(s_bytes + kTableBytes + row * shared.token_bytes +
                                           run * 64 + lane_in_group * 16);
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

  // The first and, 16 bits up, the last warp with items of each tile: known before they are needed.
  __device__ int* warps_of_tiles() const { return first_tiles() + kNumWarps + 2; }
  __device__ void share_warps() const {
    for (int tile = threadIdx.x; tile < tiles; tile += kNumThreads) {
      const int first = (tile * chunks + 1) * kNumWarps - 1;
      const int last = (tile + 1) * chunks * kNumWarps - 1;
      warps_of_tiles()[tile] = first / items | last / items << 16;
    }
  }

  // Adds the warps' sums of each tile up, in their order, and then those of the cluster's blocks;
  // a thread one, or where they are more than threads four at once.
  __device__ void store() const {
    const int fours = static_cast<int>(p.m) * (kTileRows / 4);  // of a tile
    const int out_tiles = p.gated ? tiles / 2 : tiles;
    if (splits > 1) return store_of_cluster(fours, out_tiles);
    if (4 * out_tiles * fours <= kNumThreads) return store_of_one(threadIdx.x, fours, out_tiles);
    for (int i = threadIdx.x; i < out_tiles * fours; i += kNumThreads) {
      const int tile = tile_of(i), four = i - tile * fours;
      const float4 up = p.gated ? total<float4>(tile + out_tiles, four) : float4{};
      store_sums(tile, four, total<float4>(tile, four), up);
    }
  }
  __device__ void store_of_one(int i, int fours, int out_tiles) const {
    const int tile = tile_of(i / 4), place = i - 4 * tile * fours;
    const int64_t column = int64_t{first_tile + tile} * kTileRows + place % kTileRows;
    if (i >= 4 * out_tiles * fours || column >= out_n()) return;
    T y = with_bias(total<float>(tile, place), column);
    if (p.activation != Activation::kNone) {
      y = from_float<T>(activated(p.activation, to_float(y)));
    }
    if (p.gated) {
      const T up = with_bias(total<float>(tile + out_tiles, place), out_n() + column);
      y = from_float<T>(to_float(y) * to_float(up));
    }
    static_cast<T*>(p.out)[place / kTileRows * out_n() + column] = y;
  }
  __device__ void store_of_cluster(int fours, int out_tiles) const {
    const int up = p.gated ? out_tiles * fours : 0;  // from gates' sums to what they multiply
    auto* totals = reinterpret_cast<float4*>(s_bytes + shared.totals);
    for (int i = threadIdx.x; i < tiles * fours; i += kNumThreads) {
      const int tile = tile_of(i);
      totals[i] = total<float4>(tile, i - tile * fours);
    }
    ptx::cluster_sync();
    for (int i = threadIdx.x * splits + rank; i < out_tiles * fours; i += kNumThreads * splits) {
      const int tile = tile_of(i);
      const float4 factors = p.gated ? total_of_cluster(totals + i + up) : float4{};
      store_sums(tile, i - tile * fours, total_of_cluster(totals + i), factors);
    }
    ptx::cluster_sync();  // nobody leaves while its sums are read
  }
  __device__ int tile_of(int i) const { return divided(i, over_tile); }
  static __device__ int divided(int n, uint32_t over) {
    return static_cast<int>(static_cast<uint64_t>(n) * over >> 32);
  }
  // Sum: float or float4, as which the sums of a tile are counted.
  template <typename Sum>
  __device__ Sum total(int tile, int place) const {
    const int warps = warps_of_tiles()[tile];
    Sum total{};
    for (int w = warps & 0xffff; w <= warps >> 16; ++w) {
      if (w * items / kNumWarps == (w + 1) * items / kNumWarps) continue;  // has no item
      add(total, reinterpret_cast<const Sum*>(sums_of(w, tile - first_tiles()[w]))[place]);
    }
    return total;
  }
  __device__ float4 total_of_cluster(const float4* four) const {
    float4 total{};
    for (int r = 0; r < splits; ++r) {
      add(total, ptx::load_cluster(ptx::cluster_address(ptx::shared_address(four), r)));
    }
    return total;
  }
  static __device__ void add(float& to, float one) { to += one; }
  static __device__ void add(float4& to, const float4& four) {
    to.x += four.x, to.y += four.y, to.z += four.z, to.w += four.w;
  }

  // four: of a row of x and of four rows of the tile. up: the sums that those of gates multiply.
  __device__ void store_sums(int tile, int four, const float4& sums, const float4& up) const {
    const int64_t column = int64_t{first_tile + tile} * kTileRows + four % 4 * 4;
    if (column >= out_n()) return;
    Four y = with_bias(sums, column);
    if (p.activation != Activation::kNone) {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {  // the first goes and comes back last: no index, no stack
        const T first = from_float<T>(activated(p.activation, to_float(y.of[0])));
        y = {y.of[1], y.of[2], y.of[3], first};
      }
    }
    if (p.gated) {
      const Four factors = with_bias(up, out_n() + column);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        y.of[e] = from_float<T>(to_float(y.of[e]) * to_float(factors.of[e]));
      }
    }
    T* to = static_cast<T*>(p.out) + four / 4 * out_n() + column;
    if (out_n() % 4 == 0) {  // then to lies at a multiple of four
      *reinterpret_cast<Four*>(to) = y;
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column + e < out_n()) to[e] = y.of[e];
    }
  }
  __device__ int64_t out_n() const { return p.gated ? p.n / 2 : p.n; }
  struct alignas(4 * sizeof(T)) Four {
    T of[4];
  };
  __device__ Four with_bias(const float4& sums, int64_t column) const {
    const float s[4] = {sums.x, sums.y, sums.z, sums.w};
    Four y;
#pragma unroll
    for (int e = 0; e < 4; ++e) y.of[e] = with_bias(s[e], column + e);
    return y;
  }
  // column may lie past the last one, as the fourth of four does.
  __device__ T with_bias(float total, int64_t column) const {
    if constexpr (Weights::kTable) total *= table.unit;
    if (p.bias != nullptr && column < p.n) {
      total += to_float(static_cast<const T*>(p.bias)[column]);
    }
    return from_float<T>(total);
  }
};

}  // namespace llamatelemetry
