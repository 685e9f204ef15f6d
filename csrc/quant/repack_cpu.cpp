// repack: GGUF rows into tiles of 16 rows (format/layout.h); unpack: the exact inverse.
// Bandwidth bound: 16 input streams, one output stream. One item per tile.
#include <cstring>

#include "cpu/parallel.h"
#include "quant/params.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

enum class Direction { kPack, kUnpack };

// One field of one block of num_rows rows; Word is its unit of transposition.
template <Direction kDirection, typename Word>
void transpose_field(const QuantField& field, uint8_t* rows, int64_t row_bytes, int num_rows,
                     uint8_t* packed, bool fifth_bits) {
  const int num_units = field.bytes / static_cast<int>(sizeof(Word));
  for (int unit = 0; unit < num_units; ++unit) {
    for (int row = 0; row < num_rows; ++row) {
      uint8_t* in_row = rows + row * row_bytes + field.offset + unit * sizeof(Word);
      uint8_t* in_tile = packed + field.packed + (unit * kTileRows + row) * sizeof(Word);
      Word word;
      if constexpr (kDirection == Direction::kPack) {
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

template <Direction kDirection>
void repack_tiles(const RepackParams& p, int64_t begin, int64_t end) {
  const QuantLayout& layout = p.layout;
  const int64_t tile_bytes = p.blocks_per_row * layout.block_bytes * kTileRows;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTileRows;
    const auto num_rows = static_cast<int>(p.n - first < kTileRows ? p.n - first : kTileRows);
    uint8_t* rows = p.rows + first * p.row_stride_bytes;
    uint8_t* packed = p.packed + tile * tile_bytes;
    if (kDirection == Direction::kPack && num_rows < kTileRows) std::memset(packed, 0, tile_bytes);
    for (int64_t block = 0; block < p.blocks_per_row; ++block) {
      for (const QuantField* field : {&layout.quants, &layout.sub_scales}) {
        transpose_field<kDirection, uint32_t>(*field, rows, p.row_stride_bytes, num_rows, packed,
                                              false);
      }
      const bool fifth_bits = layout.high_bits.bytes == sizeof(uint32_t);
      transpose_field<kDirection, uint32_t>(layout.high_bits, rows, p.row_stride_bytes, num_rows,
                                            packed, fifth_bits);
      for (const QuantField* field : {&layout.scale, &layout.min}) {
        transpose_field<kDirection, uint16_t>(*field, rows, p.row_stride_bytes, num_rows, packed,
                                              false);
      }
      rows += layout.block_bytes;
      packed += layout.block_bytes * kTileRows;
    }
  }
}

Work work_of(const RepackParams& p) {
  const double bytes = static_cast<double>(p.blocks_per_row) * p.layout.block_bytes * kTileRows;
  return {(p.n + kTileRows - 1) / kTileRows, 0.3 * bytes};
}

}  // namespace

Error launch_repack(const RepackParams& params, Stream) {
  parallel_over<repack_tiles<Direction::kPack>>("repack", work_of(params), params);
  return nullptr;
}

Error launch_unpack(const RepackParams& params, Stream) {
  parallel_over<repack_tiles<Direction::kUnpack>>("unpack", work_of(params), params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_repack, RepackParams)
LT_CPU_LAUNCHER(launch_unpack, RepackParams)
