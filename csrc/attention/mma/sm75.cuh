// flash_attn on Turing's tensor cores: mma.sync m16n8k8 in float16, no cp.async.
// A block of 4 warps takes kRows queries of one head. One tile of keys and one of values stand in
// shared memory; the next comes through registers, loaded before a product and stored after it, so
// that both loads hide under products. Two blocks share a multiprocessor, so that one's softmax
// hides under the other's products.
//
// Budget of a tile in clocks of one of a T4's 40 multiprocessors, from its data sheet and the bytes
// counted here: tensor cores 512 FMA a clock, shared memory 64 bytes, exp2 16.
//   head_dim  rows x keys  mma of a warp  tensor  shared read, written  shared  exp2  shared memory
//         64     128 x 64            256    2048          64, 16 KB      1280   512          16 KB
//         96      64 x 64            192    1536          96, 24 KB      1920   256          24 KB
//        128      64 x 64            256    2048         128, 32 KB      2560   256          32 KB
//        256      64 x 16            128    1024          64, 16 KB      1280    64          32 KB
// Registers of sm_75: 254, 214, 250 and 255, nothing spilled. Keys and values of a tile come from
// L2 where other blocks of the head read them too: the bytes written. Never timed on Turing.
#pragma once

#include "attention/mma/tiles.h"
#include "attention/mma/warp.cuh"

namespace llamatelemetry {

template <MmaTileConfig kConfig>
struct AttentionSm75 {
  using T = Half;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kKeys = kConfig.block_keys;
  using Params = MmaGrid;
  using Warp = MmaWarp<T, MmaSm75, kHeadDim, kConfig.row_tiles, kKeys>;
  using Tile = typename Warp::Tile;
  static constexpr int kCapability = 75;
  static constexpr int kNumWarps = kConfig.warps;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kMinBlocks = kConfig.blocks;
  static constexpr int kRows = kConfig.block_rows();
  static_assert(kConfig.scored_keys == kKeys && kConfig.query_steps == Warp::kDimSteps);
  static constexpr int kRowStep = TileShare<Tile, kKeys, kNumThreads>::kRowStep;

  struct Tiles {
    char k[Tile::bytes(kKeys)];
    char v[Tile::bytes(kKeys)];
  };
  union Shared {
    Tiles tiles;
    char rows[Tile::bytes(kRows)];  // of queries, before the tiles, and of the output after them
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static constexpr int kTuringSharedBytes = 64 << 10;
  static_assert(kSharedBytes * kMinBlocks <= kTuringSharedBytes);

  // Eight elements of a row. load_unaligned would be unrolled: too many registers here.
  static __device__ uint4 load_chunk(const T* p, bool aligned) {
    if (aligned) return __ldg(reinterpret_cast<const uint4*>(p));
    const auto* halves = reinterpret_cast<const uint16_t*>(p);
    uint4 chunk{};
#pragma unroll 1  // rare: it should take neither registers nor the other way's time
    for (int i = 0; i < Tile::kChunkElements; i += 2) {
      const uint32_t two = halves[i] | static_cast<uint32_t>(halves[i + 1]) << 16;
      chunk = {chunk.y, chunk.z, chunk.w, two};
    }
    return chunk;
  }

  // Tiles of keys, or of values, one after the other: fetch starts a load, store ends it.
  struct Loader {
    using Share = TileShare<Tile, kKeys, kNumThreads>;
    const Warp& warp;
    const Heads& x;
    const T* next;  // this thread's first chunk of the next tile
    char* s_tile;
    uint4 chunks[Share::kCount];

    __device__ Loader(const Heads& x, const Warp& warp, int64_t first_key, char* s_tile)
        : warp(warp), x(x), s_tile(s_tile) {
      first_key += warp.first_tile * int64_t{kKeys} + Share().row;
      next = HeadRows<T>(x, warp.work.index, first_key, warp.work.kv_head).first +
             Share().chunk * Tile::kChunkElements;
    }
    __device__ void fetch(int tile) {
      // Past the last tile chunks are zeros, not what they were: that would hold registers.
      const int rows = tile < warp.end_tile ? warp.work.num_keys - tile * kKeys : 0;
      const auto columns = static_cast<int>(warp.p.head_dim);
      const Share share;
#pragma unroll
      for (int i = 0; i < Share::kSteps; ++i) {
#pragma unroll
        for (int span = 0; span < Tile::kChunks; span += Tile::kSpan) {
          const bool exists = share.row + i * kRowStep < rows &&
                              (share.chunk + span) * Tile::kChunkElements < columns;
          uint4& to = chunks[(i * Tile::kChunks + span) / Tile::kSpan];
          to = uint4{};
          if (exists) {
            to = load_chunk(next + span * Tile::kChunkElements, warp.grid.aligned);
          }
        }
        next += kRowStep * x.token_stride;
      }
    }
    __device__ void store(int tile) {
      if (tile >= warp.end_tile) return;
      const Share share;
      share.for_each([&](int i, uint32_t to, int, int) {
        *reinterpret_cast<uint4*>(s_tile + to) = chunks[i];
      });
    }
  };

  // Rows that do not exist become zeros, as 0 * NaN is NaN.
  static __device__ uint4 chunk_or_zeros(const T* first, int64_t stride, int row, int chunk,
                                         int rows, int columns, bool aligned) {
    const int column = chunk * Tile::kChunkElements;
    if (row >= rows || column >= columns) return uint4{};
    return load_chunk(first + row * stride + column, aligned);
  }
  template <int kTileRows>
  static __device__ void load_tile(const T* first, int64_t stride, int rows, int columns,
                                   bool aligned, char* s_tile) {
    const TileShare<Tile, kTileRows, kNumThreads> share;
    share.template for_each<1>([&](int, uint32_t to, int row, int chunk) {
      *reinterpret_cast<uint4*>(s_tile + to) =
          chunk_or_zeros(first, stride, row, chunk, rows, columns, aligned);
    });
  }

  static __device__ void run(const Params& grid) {
    extern __shared__ __align__(128) char s_bytes[];
    auto& shared = *reinterpret_cast<Shared*>(s_bytes);
    Warp warp(grid, kRows);
    if (!warp.has_work(kRows, kKeys)) return;
    char* s_rows = shared.rows + Warp::warp() * Tile::bytes(Warp::kWarpRows);
    if (warp.first_tile < warp.end_tile) {
      attend(grid, warp, shared, s_rows);
    }
    __syncthreads();  // nobody reads the tiles any more
    warp.write(s_rows);
  }

  static __device__ void attend(const Params& grid, Warp& warp, Shared& shared,
                                const char* s_rows) {
    const AttentionParams& p = grid.attn;
    const SequenceSpan sequence = sequence_span(p, warp.work.index);
    Loader keys(p.k.rows, warp, warp.work.first_key, shared.tiles.k);
    Loader values(p.v.rows, warp, warp.work.first_key, shared.tiles.v);
    keys.fetch(warp.first_tile);
    const HeadRows<T> q(p.q, warp.work.index, sequence.first_query + warp.work.first_row,
                        warp.work.head);
    load_tile<kRows>(q.first, q.stride, warp.work.num_queries - warp.work.first_row,
                     static_cast<int>(p.head_dim), grid.aligned, shared.rows);
    __syncthreads();

    const uint32_t s_q = ptx::shared_address(s_rows) + Tile::a_offset(Warp::lane());
    uint32_t s_k = ptx::shared_address(shared.tiles.k) + Tile::b_offset(Warp::lane());
    uint32_t s_v = ptx::shared_address(shared.tiles.v) + Tile::b_trans_offset(Warp::lane());
    typename Warp::Queries queries[Warp::kDimSteps];
#pragma unroll
    for (int step = 0; step < Warp::kDimSteps; ++step) {
      Warp::load_queries(queries[step], s_q, step);
    }
    __syncthreads();
    keys.store(warp.first_tile);
    __syncthreads();
#pragma unroll 1
    for (int tile = warp.first_tile; tile < warp.end_tile; ++tile) {
      // What follows from these is computed again for each tile: there is no register to hold it.
      ptx::keep(s_k);
      ptx::keep(s_v);
      const bool unmasked = warp.is_unmasked(tile);
      const bool sees = unmasked || warp.sees(tile);
      values.fetch(tile);
      Warp::clear(warp.s);  // seen or not, as old scores would hold registers
      if (sees) {
#pragma unroll
        for (int step = 0; step < Warp::kDimSteps; ++step) {
          warp.multiply_keys(queries[step], s_k, step);
        }
      }
      values.store(tile);
      __syncthreads();  // these values are here, and nobody reads these keys any more
      if (sees) warp.finish_scores(tile, unmasked);
      keys.fetch(tile + 1);
      if (sees) warp.multiply_values(s_v);
      keys.store(tile + 1);
      __syncthreads();  // the next keys are here, and nobody reads these values any more
    }
  }
};

}  // namespace llamatelemetry
