// How the bits of a block of quantised weights lie in a file's rows and in the packed layout that
// our kernels read. Torch-free; one layout for CPU and CUDA. Which format has which fields:
// format.h.
//
// A row is a sequence of blocks of block_size weights, block_bytes each. The layout "rows16" packs
// kTileRows rows into a tile: a packed matrix is uint8 [ceil(n / 16), 16 * row_bytes], rows past n
// are zero bytes (scale 0), and byte counts stay the file's. A tile is the sequence of its packed
// blocks along k, each 16 * block_bytes long. A packed block holds the same block of the 16 rows,
// one field after another (quants, high_bits, sub_scales, scale, min, sub_scales_high), each field
// transposed by units:
//
//   packed[field.packed + unit * 16 * bytes_of_unit + row * bytes_of_unit]
//
// with 4-byte units, except the last three fields, which are one unit a row: 16 of fp16 in 32
// bytes. So 64 bytes hold one 32-bit word of each row, and a word holds the codes of 4 consecutive
// weights, one in each byte (what vpdpbusd and dp4a take). "Group g" is weights 4g .. 4g + 3 of a
// sub-block of 32:
//
//   codes, block_size
//   u4, u5 in 32       word j: low nibbles = group j, high nibbles = group j + 4
//   u5 in 32           high_bits, one word: bit g of byte i = bit 4 of weight 4g + i  (file: bit
//                      4g + i; group_high_bits and ungroup_high_bits move them)
//   s8 in 32           word j: group j, int8
//   u4, u5 in 256      word 8c + j: low nibbles = group j of sub-block 2c, high of 2c + 1
//   u5 in 256          high_bits, word j: bit s of each byte = bit 4 of group j of sub-block s
//   u6 in 256          word 16h + 8p + j: low nibbles = group j of sub-block 4h + p, high nibbles
//                      = of 4h + p + 2
//   u6 in 256          high_bits, word 8h + j: bits 2p, 2p + 1 of each byte = bits 4, 5 of group j
//                      of sub-block 4h + p
//   u2, u3 in 256      word 8h + j: bits 2p, 2p + 1 of each byte = bits 0, 1 of group j of
//                      sub-block 4h + p
//   u3 in 256          high_bits, word j: bit s of each byte = bit 2 of group j of sub-block s
//   iq4, e2m1, nf4,     as u4
//   fp4 in 32
//   iq4 in 256         word 4s + j: low nibbles = group j of sub-block s, high = group j + 4
//   ternary in 256     word j < 8: digit s of each byte = group j of sub-block s < 5; word 8 + j:
//                      digit d = weights 160 + 16d + 4j ..; word 12: digit d = weights 240 + 4d ..
//                      (digit d of byte b: 3 * (b * 3^d mod 256) / 256)
//   scale rule
//   sub_block32        words a, b, c: 6-bit scales and minima of sub-blocks 0-3 in bytes 0-3:
//                      a & 0x3f.., b & 0x3f..; of 4-7: (c & 0x0f..) | (a >> 2 & 0x30..),
//                      (c >> 4 & 0x0f..) | (b >> 2 & 0x30..)
//   sub_block16        byte i of word w: int8 scale of weights 16 * (4w + i) .. + 15
//   sub_block16_four   likewise: scale in the low nibble, minimum in the high one
//   sub_block16_six    words a, b, c, of weights 16 * (4w + i) in byte i: a & 0x0f.. for
//                      w = 0, b for 1, a >> 4 for 2, b >> 4 for 3, each
//                      | (c >> 2w & 0x03..) << 4; less 32
//   sub_block32_six    nibble s: low four bits for sub-block s; bits 2s, 2s + 1 of sub_scales_high:
//                      the other two; less 32
#pragma once

#include <cstdint>
#include <initializer_list>

namespace llamatelemetry {

constexpr int kTileRows = 16;
constexpr const char* kPackedLayouts[] = {"rows16"};

struct QuantField {
  int offset;      // in a block of the file, bytes
  int bytes;       // in a block of the file; 0: the format has no such field
  int packed = 0;  // offset in a packed block
};

struct BlockLayout {
  int block_size;   // weights
  int block_bytes;  // of the file; a packed block has kTileRows times as many
  QuantField quants;
  QuantField high_bits;
  QuantField sub_scales;
  QuantField scale;                  // d, fp16, or the byte of an exponent
  QuantField min;                    // m or dmin, fp16
  QuantField sub_scales_high{0, 0};  // two bits for each of 8 sub-blocks
};

// static: in files that are compiled per instruction set nothing inline may have linkage.
static constexpr BlockLayout with_packed_offsets(BlockLayout layout) {
  int next = 0;
  for (QuantField* field : {&layout.quants, &layout.high_bits, &layout.sub_scales, &layout.scale,
                            &layout.min, &layout.sub_scales_high}) {
    field->packed = next;
    next += kTileRows * field->bytes;
  }
  return layout;
}

// Whether the fifth bits of 32 weights are one word, which packing regroups.
static constexpr bool has_fifth_bits_word(const BlockLayout& layout) {
  return layout.high_bits.bytes == sizeof(uint32_t);
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
