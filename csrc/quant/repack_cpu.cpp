// repack: rows of a file into tiles of 16 rows (format/layout.h); unpack: the exact inverse.
// Bandwidth bound: 16 input streams, one output stream. One item per tile.
#include <cstring>
#include <type_traits>

#include "cpu/parallel.h"
#include "quant/params.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

// One field of one block of num_rows rows; Word is its unit of transposition. The
// side that is read has const bytes.
template <typename Word, typename RowsByte, typename PackedByte>
void transpose_field(const QuantField& field, RowsByte* rows, int64_t row_bytes, int num_rows,
                     PackedByte* packed, bool fifth_bits) {
  const int num_units = field.bytes / static_cast<int>(sizeof(Word));
  for (int unit = 0; unit < num_units; ++unit) {
    for (int row = 0; row < num_rows; ++row) {
      auto* in_row = rows + row * row_bytes + field.offset + unit * sizeof(Word);
      auto* in_tile = packed + field.packed + (unit * kTileRows + row) * sizeof(Word);
      Word word;
      if constexpr (std::is_const_v<RowsByte>) {
        std::memcpy(&word, in_row, sizeof word);
        if (fifth_bits) word = static_cast<Word>(group_high_bits(word));
        std::memcpy(in_tile, &word, sizeof word);
      } else {
        std::memcpy(&word, in_tile, sizeof word);
        if (fifth_bits) word = static_cast<Word>(ungroup_high_bits(word));
        std::memcpy(in_row, &word, sizeof word);
      }
    }
  }
}

// Params is RepackParams or UnpackParams.
template <typename Params>
void repack_tiles(const Params& p, int64_t begin, int64_t end) {
  const auto& [n, blocks_per_row, row_stride_bytes, layout] = p.sizes;
  const int64_t tile_bytes = blocks_per_row * layout.block_bytes * kTileRows;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTileRows;
    const auto num_rows = static_cast<int>(n - first < kTileRows ? n - first : kTileRows);
    auto* rows = p.rows + first * row_stride_bytes;
    auto* packed = p.packed + tile * tile_bytes;
    if constexpr (std::is_same_v<Params, RepackParams>) {
      if (num_rows < kTileRows) std::memset(packed, 0, tile_bytes);
    }
    for (int64_t block = 0; block < blocks_per_row; ++block) {
      for (const QuantField* field : {&layout.quants, &layout.sub_scales}) {
        transpose_field<uint32_t>(*field, rows, row_stride_bytes, num_rows, packed, false);
      }
      transpose_field<uint32_t>(layout.high_bits, rows, row_stride_bytes, num_rows, packed,
                                has_fifth_bits_word(layout));
      if (layout.scale.bytes == 1) {
        transpose_field<uint8_t>(layout.scale, rows, row_stride_bytes, num_rows, packed, false);
      } else {
        transpose_field<uint16_t>(layout.scale, rows, row_stride_bytes, num_rows, packed, false);
      }
      for (const QuantField* field : {&layout.min, &layout.sub_scales_high}) {
        transpose_field<uint16_t>(*field, rows, row_stride_bytes, num_rows, packed, false);
      }
      rows += layout.block_bytes;
      packed += layout.block_bytes * kTileRows;
    }
  }
}

Work work_of(const RepackSizes& sizes) {
  const double bytes =
      static_cast<double>(sizes.blocks_per_row) * sizes.layout.block_bytes * kTileRows;
  return {(sizes.n + kTileRows - 1) / kTileRows, 0.3 * bytes};
}

}  // namespace

Error launch_repack(const RepackParams& params, Stream) {
  parallel_over<repack_tiles<RepackParams>>("repack", work_of(params.sizes), params);
  return nullptr;
}

Error launch_unpack(const UnpackParams& params, Stream) {
  parallel_over<repack_tiles<UnpackParams>>("unpack", work_of(params.sizes), params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_repack, RepackParams)
LT_CPU_LAUNCHER(launch_unpack, UnpackParams)
