// flash_attn on the tensor cores of Ampere and later: mma.sync m16n8k16.         (Dao 2023)
// A block of warps takes kRows queries of one head. Keys and values come by cp.async, one
// tile ahead of the products, in two stages: one barrier a tile.
//
// What bounds it, in clocks per score and multiprocessor of an H200, 32 rows a warp: at head_dim
// 128 tensor cores 0.20 (653 TFLOP/s is all that mma.sync does there), shared memory 0.16 for
// fragments and 0.03 for cp.async, exp2 0.06; at 64 half of each but exp2. 16 rows a warp would
// read twice as much shared memory. Two warps share a scheduler, so every instruction beside the
// products costs: addresses stand in registers and branches are few.
#pragma once

#include "attention/mma/tiles.h"
#include "attention/mma/warp.cuh"

namespace llamatelemetry {

// Keys and values of the heads that are worked on together, at most: a part of an A100's L2.
constexpr int64_t kGroupBytes = 16 << 20;

template <typename T, MmaTileConfig kConfig>
struct AttentionSm80 {
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kKeys = kConfig.block_keys;
  static constexpr int kScoredKeys = kConfig.scored_keys;
  static constexpr int kQuerySteps = kConfig.query_steps;
  using Params = MmaGrid;
  using Warp = MmaWarp<T, MmaSm80, kHeadDim, kConfig.row_tiles, kScoredKeys>;
  using Tile = typename Warp::Tile;
  static constexpr int kCapability = 80;
  static constexpr int kNumThreads = kConfig.warps * kWarpSize;
  static constexpr int kMinBlocks = kConfig.blocks;
  static constexpr int kRows = kConfig.block_rows();
  static constexpr int kParts = kKeys / kScoredKeys;
  static constexpr int kUnrolledParts = kHeadDim == 128 ? kParts : 1;  // at 64 it costs 1 %
  static constexpr int kRowStep = TileShare<Tile, kKeys, kNumThreads>::kRowStep;

  struct Stage {
    char k[Tile::bytes(kKeys)];
    char v[Tile::bytes(kKeys)];
  };
  struct alignas(128) Shared {
    char q[Tile::bytes(kRows)];  // in the end the output
    Stage stages[2];
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static_assert(kSharedBytes == sm80::shared_bytes(kConfig));  // what the choice counts with

  // Loads tiles of keys and values that lie in pages: a look into the table a row.
  struct PagedLoader {
    const Warp& warp;
    PagedRows<T> k;
    PagedRows<T> v;

    __device__ PagedLoader(const Warp& warp, int64_t, Shared&)
        : warp(warp),
          k(warp.p, warp.p.k.rows, warp.work.index, warp.work.kv_head),
          v(warp.p, warp.p.v.rows, warp.work.index, warp.work.kv_head) {}

    __device__ void load(int tile, Shared& shared, uint32_t stage) {
      if (tile >= warp.end_tile) return;
      Stage& to = shared.stages[stage / sizeof(Stage)];
      load_rows(k, tile * kKeys, to.k);
      load_rows(v, tile * kKeys, to.v);
      ptx::cp_async_commit();
    }

   private:
    __device__ void load_rows(const PagedRows<T>& x, int first_key, char* s_tile) const {
      const uint32_t address = ptx::shared_address(s_tile);
      const TileShare<Tile, kKeys, kNumThreads> share;
      share.template for_each<2>([&](int, uint32_t to, int row, int chunk) {
        const int column = chunk * Tile::kChunkElements;
        const int key = first_key + row;
        const bool exists =
            key >= warp.work.begin_key && key < warp.work.end_key && column < warp.p.head_dim;
        const T* from = exists ? x.row(key) + column : x.head;
        if (warp.grid.aligned) {
          ptx::cp_async_16_or_zeros(address + to, from, exists);
        } else {
          *reinterpret_cast<uint4*>(s_tile + to) = exists ? load_unaligned(from) : uint4{};
        }
      });
    }
  };

  // Loads tiles of keys and values, one after the other. kAligned: by cp.async, else by elements.
  // The products wait for nothing here: all that a whole tile needs is in registers.
  template <bool kAligned>
  struct Loader {
    using Share = TileShare<Tile, kKeys, kNumThreads>;
    const Warp& warp;
    const char* k;  // this thread's first chunk of the next tile
    const char* v;
    uint32_t s_first;     // where that chunk goes in stage 0
    uint32_t num_chunks;  // of a row: those past head_dim are not copied
    int whole_end;        // tiles before it have all their keys

    __device__ Loader(const Warp& warp, int64_t first_key, Shared& shared) : warp(warp) {
      const AttentionParams& p = warp.p;
      const Share share;
      first_key += warp.first_tile * int64_t{kKeys} + share.row;
      const auto start = [&](const Heads& x) {
        const HeadRows<T> rows(x, warp.work.index, first_key, warp.work.kv_head);
        return reinterpret_cast<const char*>(rows.first) + share.chunk * Tile::kChunkBytes;
      };
      k = start(p.k.rows);
      v = start(p.v.rows);
      s_first = ptx::shared_address(shared.stages) + Tile::offset(share.row, share.chunk);
      const int chunks = static_cast<int>(p.head_dim) / Tile::kChunkElements;
      num_chunks = (max(chunks - share.chunk, 0) + Tile::kSpan - 1) / Tile::kSpan;
      whole_end = kAligned ? min(warp.work.num_keys / kKeys, warp.end_tile) : 0;
      ptx::keep(s_first);
      ptx::keep(num_chunks);
      // Columns past head_dim keep these zeros.
      if (kAligned && p.head_dim < kHeadDim) {
        auto* words = reinterpret_cast<uint4*>(shared.stages);
        for (int i = threadIdx.x; i < sizeof(shared.stages) / sizeof(uint4); i += kNumThreads) {
          words[i] = uint4{};
        }
        __syncthreads();
      }
    }

    // Tile `tile` to a stage, which is `stage` bytes from the first.
    __device__ void load(int tile, Shared& shared, uint32_t stage) {
      if (tile < whole_end) {
        k = copy(k, warp.grid.k_step, s_first + stage + offsetof(Stage, k));
        v = copy(v, warp.grid.v_step, s_first + stage + offsetof(Stage, v));
        ptx::cp_async_commit();
      } else if (tile < warp.end_tile) {
        const AttentionParams& p = warp.p;
        Stage& to = shared.stages[stage / sizeof(Stage)];
        const int rows = warp.work.num_keys - tile * kKeys;
        const auto columns = static_cast<int>(p.head_dim);
        const int64_t own_chunk = Share().chunk * Tile::kChunkElements;
        const auto first_of = [&](const char* own, const Heads& x) {
          return reinterpret_cast<const T*>(own) - own_chunk - Share().row * x.token_stride;
        };
        load_tile<kAligned, kKeys>(first_of(k, p.k.rows), p.k.rows.token_stride, rows, columns,
                                   to.k);
        load_tile<kAligned, kKeys>(first_of(v, p.v.rows), p.v.rows.token_stride, rows, columns,
                                   to.v);
        k += kKeys * p.k.rows.token_stride * int64_t{sizeof(T)};
        v += kKeys * p.v.rows.token_stride * int64_t{sizeof(T)};
        ptx::cp_async_commit();
      }
    }

   private:
    __device__ const char* copy(const char* from, uint32_t step, uint32_t to) const {
#pragma unroll
      for (int i = 0; i < Share::kSteps; ++i) {
#pragma unroll
        for (int span = 0; span < Tile::kChunks / Tile::kSpan; ++span) {
          constexpr int kSpanBytes = Tile::kSpan * Tile::kChunkBytes;
          if (span < num_chunks) {
            ptx::cp_async_16(to + Tile::bytes(i * Share::kRowStep) + span * kSpanBytes,
                             from + span * kSpanBytes);
          }
        }
        from += step;
      }
      return from;
    }
  };

  // rows: how many there are from `first` on; those past them become zeros, as 0 * NaN is NaN.
  template <bool kAligned, int kTileRows, int kUnroll = 1>
  static __device__ void load_tile(const T* first, int64_t stride, int rows, int columns,
                                   char* s_tile) {
    const uint32_t address = ptx::shared_address(s_tile);
    const TileShare<Tile, kTileRows, kNumThreads> share;
    share.template for_each<kUnroll>([&](int, uint32_t to, int row, int chunk) {
      const int column = chunk * Tile::kChunkElements;
      const bool exists = row < rows && column < columns;
      const T* from = first + row * stride + column;
      if constexpr (kAligned) {
        ptx::cp_async_16_or_zeros(address + to, from, exists);
      } else {
        *reinterpret_cast<uint4*>(s_tile + to) = exists ? load_unaligned(from) : uint4{};
      }
    });
  }
  static __device__ void run(const Params& grid) {
    extern __shared__ __align__(128) char s_bytes[];
    auto& shared = *reinterpret_cast<Shared*>(s_bytes);
    Warp warp(grid, kRows);
    if (!warp.has_work(kRows, kKeys)) return;
    char* s_rows = shared.q + Warp::warp() * Tile::bytes(Warp::kWarpRows);
    if (warp.first_tile < warp.end_tile) {
      if constexpr (kConfig.paged) {
        attend<PagedLoader, false>(warp, shared, s_rows);
      } else if (grid.aligned) {
        attend<Loader<true>, true>(warp, shared, s_rows);
      } else {
        attend<Loader<false>, false>(warp, shared, s_rows);
      }
    }
    __syncwarp();
    warp.write(s_rows);
  }

  template <typename KeyLoader, bool kAligned>
  static __device__ void attend(Warp& warp, Shared& shared, const char* s_rows) {
    const AttentionParams& p = warp.p;
    KeyLoader loader(warp, warp.work.first_key, shared);
    const int64_t first_query = sequence_span(p, warp.work.index).first_query;
    const HeadRows<T> q(p.q, warp.work.index, first_query + warp.work.first_row, warp.work.head);
    load_tile<kAligned, kRows, kAligned ? 8 : 1>(q.first, q.stride,
                                                 warp.work.num_queries - warp.work.first_row,
                                                 static_cast<int>(p.head_dim), shared.q);
    loader.load(warp.first_tile, shared, 0);

    uint32_t s_q = ptx::shared_address(s_rows) + Tile::a_offset(Warp::lane());
    uint32_t s_k = ptx::shared_address(shared.stages[0].k) + Tile::b_offset(Warp::lane());
    uint32_t s_v = ptx::shared_address(shared.stages[0].v) + Tile::b_trans_offset(Warp::lane());
    ptx::keep(s_q);
    ptx::keep(s_k);
    ptx::keep(s_v);
    typename Warp::Queries r_q[kQuerySteps > 0 ? kQuerySteps : 1];
    if constexpr (kQuerySteps > 0) {
      ptx::cp_async_wait<0>();
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kQuerySteps; ++step) Warp::load_queries(r_q[step], s_q, step);
    }
    uint32_t stage = 0;  // of this tile
#pragma unroll 1
    for (int tile = warp.first_tile; tile < warp.end_tile; ++tile) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this tile is here, and nobody reads the last one any more
      const uint32_t next_stage = sizeof(Stage) - stage;
      loader.load(tile + 1, shared, next_stage);
#pragma unroll kUnrolledParts
      for (int part = 0; part < kParts; ++part) {
        const int scored = tile * kParts + part;
        const bool unmasked = warp.is_unmasked(scored);
        if (!unmasked && !warp.sees(scored)) continue;
        const uint32_t first_key = stage + part * Tile::bytes(kScoredKeys);
        Warp::clear(warp.s);
#pragma unroll
        for (int step = 0; step < Warp::kDimSteps; ++step) {
          if (step < kQuerySteps) {
            warp.multiply_keys(r_q[step < kQuerySteps ? step : 0], s_k + first_key, step);
          } else {
            typename Warp::Queries queries;
            Warp::load_queries(queries, s_q, step);
            warp.multiply_keys(queries, s_k + first_key, step);
          }
        }
        warp.finish_scores(scored, unmasked);
        warp.multiply_values(s_v + first_key);
      }
      stage = next_stage;
    }
  }
};

}  // namespace llamatelemetry
