// repack: rows of a file into tiles of 16 rows (format/layout.h); unpack: the exact inverse.
// Runs once per weight, so it is kept plain: a thread moves one block of one row, whose bytes L1
// holds; 16 threads together read or write whole sectors of the tile.
// Grid [blocks that hold a thread per row and block, rows padded to whole tiles], block
// kNumThreads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "quant/params.h"

namespace llamatelemetry {

// A field that is transposed by words. Rows of a file have no alignment: they go byte by byte.
__device__ inline void pack_field(const QuantField& field, const uint8_t* block, uint8_t* packed,
                                  bool in_matrix, bool fifth_bits) {
  auto* units = reinterpret_cast<uint32_t*>(packed + field.packed);
  for (int unit = 0; unit < field.bytes / static_cast<int>(sizeof(uint32_t)); ++unit) {
    uint32_t value = 0;
    for (int i = 0; in_matrix && i < static_cast<int>(sizeof(uint32_t)); ++i) {
      value |= static_cast<uint32_t>(block[field.offset + unit * sizeof(uint32_t) + i]) << (8 * i);
    }
    units[unit * kTileRows] = fifth_bits ? group_high_bits(value) : value;
  }
}

__device__ inline void unpack_field(const QuantField& field, uint8_t* block, const uint8_t* packed,
                                    bool fifth_bits) {
  const auto* units = reinterpret_cast<const uint32_t*>(packed + field.packed);
  for (int unit = 0; unit < field.bytes / static_cast<int>(sizeof(uint32_t)); ++unit) {
    const uint32_t word = units[unit * kTileRows];
    const uint32_t value = fifth_bits ? ungroup_high_bits(word) : word;
    for (int i = 0; i < static_cast<int>(sizeof(uint32_t)); ++i) {
      block[field.offset + unit * sizeof(uint32_t) + i] = static_cast<uint8_t>(value >> (8 * i));
    }
  }
}

// A field of one unit a row: an exponent's byte or the two of a float16. The side that is read has
// const bytes.
template <typename RowsByte, typename PackedByte>
__device__ inline void move_unit(const QuantField& field, RowsByte* block, PackedByte* packed,
                                 int row_in_tile, bool in_matrix) {
  auto* in_tile = packed + field.packed + row_in_tile * field.bytes;
  for (int i = 0; i < field.bytes; ++i) {
    if constexpr (std::is_const_v<RowsByte>) {
      in_tile[i] = in_matrix ? block[field.offset + i] : 0;
    } else {
      block[field.offset + i] = in_tile[i];
    }
  }
}

// Params is RepackParams or UnpackParams.
template <typename Params, int kNumThreads>
__global__ void __launch_bounds__(kNumThreads) repack_kernel(const Params p) {
  constexpr bool kPack = std::is_same_v<Params, RepackParams>;
  const auto& [n, blocks_per_row, row_stride_bytes, layout] = p.sizes;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kNumThreads + threadIdx.x;
  const int64_t packed_block = index / kTileRows;  // counted through all tiles
  const int64_t tile = packed_block / blocks_per_row;
  const int row_in_tile = static_cast<int>(index % kTileRows);
  const int64_t row = tile * kTileRows + row_in_tile;
  if (tile >= (n + kTileRows - 1) / kTileRows || (!kPack && row >= n)) return;

  const int64_t block_of_row = packed_block - tile * blocks_per_row;
  auto* block = p.rows + row * row_stride_bytes + block_of_row * layout.block_bytes;
  auto* packed = p.packed + packed_block * kTileRows * layout.block_bytes;
  auto* packed_words = packed + row_in_tile * sizeof(uint32_t);
  const bool fifth_bits = has_fifth_bits_word(layout);
  if constexpr (kPack) {
    const bool in_matrix = row < n;
    pack_field(layout.quants, block, packed_words, in_matrix, false);
    pack_field(layout.high_bits, block, packed_words, in_matrix, fifth_bits);
    pack_field(layout.sub_scales, block, packed_words, in_matrix, false);
  } else {
    unpack_field(layout.quants, block, packed_words, false);
    unpack_field(layout.high_bits, block, packed_words, fifth_bits);
    unpack_field(layout.sub_scales, block, packed_words, false);
  }
  move_unit(layout.scale, block, packed, row_in_tile, row < n);
  move_unit(layout.min, block, packed, row_in_tile, row < n);
  move_unit(layout.sub_scales_high, block, packed, row_in_tile, row < n);
}

}  // namespace llamatelemetry
