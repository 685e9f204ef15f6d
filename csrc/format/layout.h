// The quantised weight formats of GGUF and the layout that our kernels read. Torch-free; one layout
// for CPU and CUDA.
//
// A GGUF row is a sequence of blocks of block_size weights, block_bytes each. We pack kTileRows
// rows into a tile: a packed matrix is uint8 [ceil(n / 16), 16 * row_bytes], rows past n are zero
// bytes (scale 0), and byte counts stay GGUF's. A tile is the sequence of its packed blocks along
// k, each 16 * block_bytes long. A packed block holds the same block of the 16 rows, one field
// after another (quants, high_bits, sub_scales, scale, min), each field transposed by units:
//
//   packed[field.packed + unit * 16 * bytes_of_unit + row * bytes_of_unit]
//
// with 4-byte units, except scale and min: one fp16 per row, 16 of them in 32 bytes. So 64 bytes
// hold one 32-bit word of each row, and a word holds the codes of 4 consecutive weights, one in
// each byte (what vpdpbusd and dp4a take). "Group g" is weights 4g .. 4g + 3 of a sub-block of 32:
//
//   Q4_0, Q4_1, Q5_0, Q5_1   word j: low nibbles = group j, high nibbles = group j + 4
//   Q5_0, Q5_1 high_bits     one word: bit g of byte i = bit 4 of weight 4g + i  (GGUF: bit 4g + i;
//                            group_high_bits and ungroup_high_bits move them)
//   Q8_0                     word j: group j, int8
//   Q4_K, Q5_K               word 8c + j: low nibbles = group j of sub-block 2c, high of 2c + 1
//   Q5_K high_bits           word j: bit s of each byte = bit 4 of group j of sub-block s
//   Q4_K, Q5_K sub_scales    words a, b, c: 6-bit scales and minima of sub-blocks 0-3 in bytes 0-3:
//                            a & 0x3f.., b & 0x3f..; of 4-7: (c & 0x0f..) | (a >> 2 & 0x30..),
//                            (c >> 4 & 0x0f..) | (b >> 2 & 0x30..)
//   Q6_K                     word 16h + 8p + j: low nibbles = group j of sub-block 4h + p, high
//                            nibbles = of 4h + p + 2
//   Q6_K high_bits           word 8h + j: bits 2p, 2p + 1 of each byte = bits 4, 5 of group j of
//                            sub-block 4h + p
//   Q6_K sub_scales          byte i of word w: int8 scale of weights 16 * (4w + i) .. + 15
//
// Weights: Q4_0 d(q-8), Q5_0 d(q-16), Q8_0 dq, Q4_1 and Q5_1 dq + m, Q4_K and Q5_K
// (d sc)q - (min m), Q6_K (d sc)(q-32).                 (formats: ggml-common.h of llama.cpp)
#pragma once

#include <cstdint>

#include "common/int_menu.h"

namespace llamatelemetry {

// GGML's type numbers.
enum QuantFormat : int {
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
};
using GgufFormats = IntMenu<kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K>;

constexpr int kTileRows = 16;

struct QuantField {
  int offset;      // in a GGUF block, bytes
  int bytes;       // in a GGUF block; 0: the format has no such field
  int packed = 0;  // offset in a packed block
};

struct QuantLayout {
  int format;
  char name[8];
  int block_size;   // weights
  int block_bytes;  // of GGUF; a packed block has kTileRows times as many
  QuantField quants;
  QuantField high_bits;
  QuantField sub_scales;
  QuantField scale;  // d, fp16
  QuantField min;    // m or dmin, fp16
};

// static: in files that are compiled per instruction set nothing inline may have linkage.
static constexpr QuantLayout with_packed_offsets(QuantLayout layout) {
  int next = 0;
  for (QuantField* field :
       {&layout.quants, &layout.high_bits, &layout.sub_scales, &layout.scale, &layout.min}) {
    field->packed = next;
    next += kTileRows * field->bytes;
  }
  return layout;
}

// clang-format off: one format a line
constexpr QuantLayout kQuantLayouts[] = {
    //                                               quants     high_bits  sub_scales scale     min
    with_packed_offsets({kQ4_0, "Q4_0",  32,  18, {2, 16},   {0, 0},    {0, 0},    {0, 2},   {0, 0}}),
    with_packed_offsets({kQ4_1, "Q4_1",  32,  20, {4, 16},   {0, 0},    {0, 0},    {0, 2},   {2, 2}}),
    with_packed_offsets({kQ5_0, "Q5_0",  32,  22, {6, 16},   {2, 4},    {0, 0},    {0, 2},   {0, 0}}),
    with_packed_offsets({kQ5_1, "Q5_1",  32,  24, {8, 16},   {4, 4},    {0, 0},    {0, 2},   {2, 2}}),
    with_packed_offsets({kQ8_0, "Q8_0",  32,  34, {2, 32},   {0, 0},    {0, 0},    {0, 2},   {0, 0}}),
    with_packed_offsets({kQ4_K, "Q4_K", 256, 144, {16, 128}, {0, 0},    {4, 12},   {0, 2},   {2, 2}}),
    with_packed_offsets({kQ5_K, "Q5_K", 256, 176, {48, 128}, {16, 32},  {4, 12},   {0, 2},   {2, 2}}),
    with_packed_offsets({kQ6_K, "Q6_K", 256, 210, {0, 128},  {128, 64}, {192, 16}, {208, 2}, {0, 0}}),
};
// clang-format on

// The layout of a format of the menu.
static constexpr QuantLayout quant_layout(int format) {
  for (const QuantLayout& layout : kQuantLayouts) {
    if (layout.format == format) return layout;
  }
  return {};
}

// The 5th bits of 32 weights: bit 4g + i to bit 8i + g, and back.
static constexpr uint32_t group_high_bits(uint32_t bits) {
  uint32_t grouped = 0;
  for (int weight = 0; weight < 32; ++weight) {
    grouped |= (bits >> weight & 1) << (weight % 4 * 8 + weight / 4);
  }
  return grouped;
}
static constexpr uint32_t ungroup_high_bits(uint32_t grouped) {
  uint32_t bits = 0;
  for (int weight = 0; weight < 32; ++weight) {
    bits |= (grouped >> (weight % 4 * 8 + weight / 4) & 1) << weight;
  }
  return bits;
}

}  // namespace llamatelemetry
