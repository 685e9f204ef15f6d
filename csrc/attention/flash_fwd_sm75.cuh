// flash_attn on Turing's tensor cores: mma.sync m16n8k8 in float16, no cp.async.
// A block of 4 warps takes kRows queries of one head. One tile of keys and one of values stand in
// shared memory; the next comes through registers, loaded before a product and stored after it, so
// that both loads hide under products. A multiprocessor overlaps one block's softmax with the
// other's products.
//
// Budget of a tile, 4 warps and 128 threads (clocks of one multiprocessor: tensor cores 512 FMA,
// shared memory 128 bytes, exp2 16, global memory 4.5 bytes of DRAM at 320 GB/s, 1.59 GHz, 40 of
// them):
//   head_dim  rows x keys  mma m16n8k8  tensor  shared read + written  clocks  exp2   registers of
//   o, s, q
//         64     128 x 64    4 x 256     2048    64 KB + 16 KB           640    512      64 + 64 +
//         32 96      64 x 64    4 x 192     1536    96 KB + 24 KB           960    256      48 + 32
//         + 24
//        128      64 x 64    4 x 256     2048   128 KB + 32 KB          1280    256      64 + 32 +
//        32 256      64 x 32    4 x 256     2048   160 KB + 32 KB          1536    128     128 +
//        16, q in shared
// A tile's keys and values are as many bytes as it writes to shared memory: from L2 if other blocks
// of the head read them too. Nothing here has been timed on Turing.
#pragma once

#include "attention/flash_warp.cuh"

namespace llamatelemetry {

template <int kHeadDim, int kRowTiles, int kKeys, bool kQueriesInRegisters, int kBlocksPerSm>
struct FlashFwdSm75 {
  using T = Half;
  using Params = FlashGrid;
  using Warp = FlashWarp<T, MmaSm75, kHeadDim, kRowTiles, kKeys>;
  using Tile = typename Warp::Tile;
  static constexpr int kCapability = 75;
  static constexpr int kNumWarps = 4;
  static constexpr int kNumThreads = kNumWarps * kWarpSize;
  static constexpr int kMinBlocks = kBlocksPerSm;
  static constexpr int kRows = kNumWarps * Warp::kWarpRows;
  static constexpr int kRowStep = TileShare<Tile, kKeys, kNumThreads>::kRowStep;

  struct Tiles {
    char k[Tile::bytes(kKeys)];
    char v[Tile::bytes(kKeys)];
  };
  // The rows of queries, and in the end of the output, stand where the tiles do if they can.
  struct RowsBeside {
    Tiles tiles;
    char rows[Tile::bytes(kRows)];
  };
  union RowsInside {
    Tiles tiles;
    char rows[Tile::bytes(kRows)];
  };
  using Shared = std::conditional_t<kQueriesInRegisters, RowsInside, RowsBeside>;
  static constexpr int kSharedBytes = sizeof(Shared);
  static constexpr int kTuringSharedBytes = 64 << 10;
  static_assert(kSharedBytes * kBlocksPerSm <= kTuringSharedBytes);

  // This thread's share of every tile of keys, or of values: fetch starts a load, store ends it.
  struct Loader {
    using Share = TileShare<Tile, kKeys, kNumThreads>;
    const T* next;
    int64_t stride;
    char* s_tile;
    uint4 chunks[Share::kCount];

    __device__ Loader(const Heads& x, const Warp& warp, int64_t first_key, char* s_tile)
        : stride(x.token_stride), s_tile(s_tile) {
      next = HeadRows<T>(x, warp.work.index, first_key + int64_t{warp.first_tile} * kKeys,
                         warp.work.kv_head)
                 .first;
    }
    __device__ void fetch(const Warp& warp, int tile, bool aligned) {
      if (!aligned || tile >= warp.end_tile) return;
      const int rows = warp.work.num_keys - tile * kKeys;
      const auto columns = static_cast<int>(warp.p.head_dim);
      Share().for_each([&](int i, uint32_t, int row, int chunk) {
        chunks[i] = chunk_or_zeros(next, stride, row, chunk, rows, columns, true);
      });
    }
    __device__ void store(const Warp& warp, int tile, bool aligned) {
      if (tile >= warp.end_tile) return;
      if (aligned) {
        Share().for_each([&](int i, uint32_t to, int, int) {
          *reinterpret_cast<uint4*>(s_tile + to) = chunks[i];
        });
      } else {
        load_tile<kKeys>(next, stride, warp.work.num_keys - tile * kKeys,
                         static_cast<int>(warp.p.head_dim), false, s_tile);
      }
      next += kKeys * stride;
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
    if (!warp.has_work(kRows)) return;
    char* s_rows = shared.rows + Warp::warp() * Tile::bytes(Warp::kWarpRows);
    if (warp.first_tile < warp.end_tile) attend(grid, warp, shared, s_rows);
    __syncthreads();  // nobody reads the tiles any more
    warp.write(s_rows);
  }

  static __device__ void attend(const Params& grid, Warp& warp, Shared& shared,
                                const char* s_rows) {
    const FlashAttnParams& p = grid.attn;
    const FlashSequence sequence = flash_sequence(p, warp.work.index);
    Loader keys(p.k, warp, sequence.first_key, shared.tiles.k);
    Loader values(p.v, warp, sequence.first_key, shared.tiles.v);
    keys.fetch(warp, warp.first_tile, grid.aligned);
    const HeadRows<T> q(p.q, warp.work.index, sequence.first_query + warp.work.first_row,
                        warp.work.head);
    load_tile<kRows>(q.first, q.stride, warp.work.num_queries - warp.work.first_row,
                     static_cast<int>(p.head_dim), grid.aligned, shared.rows);
    __syncthreads();

    const auto address = [](const void* s) {
      return static_cast<uint32_t>(__cvta_generic_to_shared(s));
    };
    const uint32_t s_q = address(s_rows) + Tile::a_offset(Warp::lane());
    const uint32_t s_k = address(shared.tiles.k) + Tile::b_offset(Warp::lane());
    const uint32_t s_v = address(shared.tiles.v) + Tile::b_trans_offset(Warp::lane());
    typename Warp::Queries queries[kQueriesInRegisters ? Warp::kDimSteps : 1];
    if constexpr (kQueriesInRegisters) {
#pragma unroll
      for (int step = 0; step < Warp::kDimSteps; ++step) {
        Warp::load_queries(queries[step], s_q, step);
      }
      __syncthreads();
    }
    keys.store(warp, warp.first_tile, grid.aligned);
    __syncthreads();
#pragma unroll 1
    for (int tile = warp.first_tile; tile < warp.end_tile; ++tile) {
      const bool plain = warp.is_plain(tile);
      const bool sees = plain || warp.sees(tile);
      values.fetch(warp, tile, grid.aligned);
      if (sees) {
        Warp::clear(warp.s);
#pragma unroll
        for (int step = 0; step < Warp::kDimSteps; ++step) {
          auto& q_step = queries[kQueriesInRegisters ? step : 0];
          if constexpr (!kQueriesInRegisters) Warp::load_queries(q_step, s_q, step);
          warp.multiply_keys(q_step, s_k, step);
        }
      }
      values.store(warp, tile, grid.aligned);
      __syncthreads();  // these values are here, and nobody reads these keys any more
      keys.fetch(warp, tile + 1, grid.aligned);
      if (sees) {
        warp.finish_scores(tile, plain);
        warp.multiply_values(s_v);
      }
      keys.store(warp, tile + 1, grid.aligned);
      __syncthreads();  // the next keys are here, and nobody reads these values any more
    }
  }
};

}  // namespace llamatelemetry
