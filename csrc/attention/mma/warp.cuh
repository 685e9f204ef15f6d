// A warp's share of a tensor-core kernel of flash_attn: 16 * kRowTiles queries against tiles of
// kKeys keys and values in shared memory. Weights stay in registers: accumulators of the scores,
// packed in pairs, are a fragment of the product with the values.
#pragma once

#include "attention/mma/epilogue.cuh"
#include "attention/mma/grid.cuh"
#include "attention/mma/load.cuh"
#include "attention/mma/softmax.cuh"

namespace llamatelemetry {

template <typename T, typename Mma, int kHeadDim, int kRowTiles, int kKeys>
struct MmaWarp {
  using Tile = SwizzledTile<kHeadDim>;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kKeyPairs = kKeys / 16;  // of tiles: one step of the product with the values
  static constexpr int kDimTiles = kHeadDim / 8;
  static constexpr int kDimSteps = kHeadDim / 16;  // of the product with the keys
  using Queries = uint32_t[kRowTiles][4];          // fragments of one step of it
  using Weights = uint32_t[kRowTiles][4];          // and of the other product

  const MmaGrid& grid;
  const AttentionParams& p;
  const MmaWork work;
  const int first_row;               // of the warp, in the sequence
  int first_tile, end_tile;          // tiles of keys that the rows of the block see
  int unmasked_begin, unmasked_end;  // those of them whose scores are only scaled, in this warp
  OnlineSoftmax<kRowTiles> softmax;
  float o[kRowTiles][kDimTiles][4];
  float s[kRowTiles][kKeyTiles][4];

  static __device__ int warp() { return threadIdx.x / kWarpSize; }
  static __device__ int lane() { return threadIdx.x % kWarpSize; }

  __device__ MmaWarp(const MmaGrid& grid, int block_rows)
      : grid(grid),
        p(grid.attn),
        work(grid, block_rows),
        first_row(work.first_row + warp() * kWarpRows) {
    clear(o);
  }

  // Whether the block has queries; finds their keys.
  __device__ bool has_work(int block_rows, int tile_keys) {
    if (work.first_row >= work.num_queries) return false;
    const int end_row = min(work.first_row + block_rows, work.num_queries);
    const int begin = static_cast<int>(keys_of_row(work.first_row).begin);
    const int end = static_cast<int>(keys_of_row(end_row - 1).end);
    first_tile = begin / tile_keys;
    end_tile = begin < end ? (end + tile_keys - 1) / tile_keys : 0;
    unmasked_begin = unmasked_end = 0;
    if (first_row < work.num_queries && !grid.needs_score_rule) {
      unmasked_begin = static_cast<int>((keys_of_row(last_row()).begin + kKeys - 1) / kKeys);
      unmasked_end = static_cast<int>(keys_of_row(first_row).end / kKeys);
    }
    return true;
  }
  __device__ bool is_unmasked(int tile) const {
    return unmasked_begin <= tile && tile < unmasked_end;
  }
  // Whether any row of the warp sees a key of the tile.
  __device__ bool sees(int tile) const {
    auto row = static_cast<uint32_t>(first_row);
    ptx::keep(row);  // few tiles are masked: the bounds should not wait in registers for them
    const int first = static_cast<int>(row);
    const int last = min(first + kWarpRows, work.num_queries) - 1;
    return first <= last && tile * kKeys < keys_of_row(last).end &&
           (tile + 1) * kKeys > keys_of_row(first).begin;
  }

  template <int kTiles>
  static __device__ void clear(float (&tiles)[kRowTiles][kTiles][4]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) tiles[r][t][e] = 0;
      }
    }
  }

  // queries: the address of this lane's fragments of the warp's rows.
  static __device__ void load_queries(Queries& q, uint32_t queries, int step) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      ptx::ldmatrix_x4(q[r], Tile::advance(queries, 2 * step) + Tile::bytes(16 * r));
    }
  }

  // s += q * keys^T over the 16 dimensions of a step.
  __device__ void multiply_keys(const Queries& q, uint32_t keys, int step) {
#pragma unroll
    for (int pair = 0; pair < kKeyPairs; ++pair) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, Tile::advance(keys, 2 * step) + Tile::bytes(16 * pair));
      multiply_pair(s, 2 * pair, q, b);
    }
  }

  // Of the scores of a tile: what softmax works on.
  __device__ void finish_scores(int tile, bool unmasked) {
    if (!unmasked) {
      if (grid.needs_score_rule) apply_score_rule(s, p, work, first_row, tile * kKeys);
      mask_scores(s, p, work, first_row, tile * kKeys);
    }
    softmax.raise(s, grid.scale_log2, o);
  }

  // o += weights of the scores * values. The next weights are made during this product.
  __device__ void multiply_values(uint32_t values) {
    Weights weights[2];
    softmax.template exponentiate<T>(s, grid.scale_log2, 0, weights[0]);
#pragma unroll
    for (int pair = 0; pair < kKeyPairs; ++pair) {
      if (pair + 1 < kKeyPairs) {
        softmax.template exponentiate<T>(s, grid.scale_log2, 2 * pair + 2, weights[(pair + 1) % 2]);
      }
#pragma unroll
      for (int step = 0; step < kDimSteps; ++step) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, Tile::advance(values, 2 * step) + Tile::bytes(16 * pair));
        multiply_pair(o, 2 * step, weights[pair % 2], b);
      }
    }
  }

  // stage: the warp's rows in shared memory, nobody else's any more.
  __device__ void write(char* stage) const {
    write_rows<T, Tile>(p, work, o, softmax, first_row, stage);
  }

 private:
  __device__ KeyRange keys_of_row(int row) const { return work.keys_of_row(p, row); }
  __device__ int last_row() const { return min(first_row + kWarpRows, work.num_queries) - 1; }

  // Tiles t and t + 1 of every row tile. The row tiles in turn from either end, so that
  // neighbouring products share an operand.
  template <int kTiles>
  static __device__ void multiply_pair(float (&d)[kRowTiles][kTiles][4], int t,
                                       const uint32_t (&a)[kRowTiles][4], const uint32_t (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        const int r = i % 2 == 0 ? j : kRowTiles - 1 - j;
        Mma::template add<T>(d[r][t + i], a[r], b[2 * i], b[2 * i + 1]);
      }
    }
  }
};

}  // namespace llamatelemetry
