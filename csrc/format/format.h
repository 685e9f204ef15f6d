// The quantised weight formats: a format is one row of kFormats and stands nowhere else in C++.
//
//   weight = scale * (code - zero_point)          without a minimum
//   weight = scale * (code - zero_point) +- min   with one; the scale rule says the sign
//
// In families with a table the code is the table's value at a nibble: an integer, or a float.
//
// Kernels are written per code family and scale rule (decode.cuh, decode_cpu.h, gguf.h) and
// instantiated per row, so a format of a family and rule that exist is a row and no more. Params
// and template arguments call a row by its number in the table, ops and Python by its name.
// Torch-free. Where the fields lie, and how codes and scales lie in them: layout.h. Source of
// GGUF's rows: ggml-common.h of llama.cpp.
#pragma once

#include <cstdint>
#include <utility>

#include "common/int_menu.h"
#include "format/layout.h"

namespace llamatelemetry {

// How a code is stored.
enum class CodeFamily : int8_t {
  kU4,       // a nibble
  kU5,       // a nibble, and the fifth bit in a plane of its own (high_bits)
  kU6,       // a nibble, and two bits in planes of their own
  kS8,       // int8
  kU2,       // two bits
  kU3,       // two bits, and the third in a plane of its own
  kIq4,      // a nibble, the index of one of 16 int8 values: code_table
  kE2m1,     // a nibble: sign, two bits of exponent, one of mantissa; the code is twice the value
  kTernary,  // five digits of base 3 in a byte, as a fraction of 256
  kE4m3,     // a byte: sign, four bits of exponent (bias 7), three of mantissa; no infinity
  kNf4,      // a nibble, the index of one of 16 float32 values: float_table
  kFp4,      // likewise
};

// How many weights share a scale, and how it is stored.
enum class ScaleRule : int8_t {
  kBlock,           // d of the block; its minimum is added
  kSubBlock32,      // 32 weights: d times a 6-bit integer; dmin times another is subtracted
  kSubBlock16,      // 16 weights: d times an int8; no minimum
  kSubBlock16Six,   // 16 weights: d times (a 6-bit integer - 32); no minimum
  kSubBlock16Four,  // 16 weights: d times a 4-bit integer; dmin times another is subtracted
  kSubBlock32Six,   // 32 weights: d times (a 6-bit integer - 32); no minimum
  kExponent,        // of the block: a byte e, 2^(e - 128): half of e8m0, for codes that are doubled
  kGroup,           // of 32, 64, 128 or all weights of a row: a tensor beside the blocks, groups.h
};

static constexpr const char* code_family_name(CodeFamily codes) {
  switch (codes) {
    case CodeFamily::kU4: return "u4";
    case CodeFamily::kU5: return "u5";
    case CodeFamily::kU6: return "u6";
    case CodeFamily::kS8: return "s8";
    case CodeFamily::kU2: return "u2";
    case CodeFamily::kU3: return "u3";
    case CodeFamily::kIq4: return "iq4";
    case CodeFamily::kE2m1: return "e2m1";
    case CodeFamily::kTernary: return "ternary";
    case CodeFamily::kE4m3: return "e4m3";
    case CodeFamily::kNf4: return "nf4";
    case CodeFamily::kFp4: return "fp4";
  }
  return "unknown";
}

static constexpr const char* scale_rule_name(ScaleRule rule) {
  switch (rule) {
    case ScaleRule::kBlock: return "block";
    case ScaleRule::kSubBlock32: return "sub_block32";
    case ScaleRule::kSubBlock16: return "sub_block16";
    case ScaleRule::kSubBlock16Six: return "sub_block16_six";
    case ScaleRule::kSubBlock16Four: return "sub_block16_four";
    case ScaleRule::kSubBlock32Six: return "sub_block32_six";
    case ScaleRule::kExponent: return "exponent";
    case ScaleRule::kGroup: return "group";
  }
  return "unknown";
}

struct FormatDescriptor {
  char name[16];
  int ggml_type;  // GGUF's number of the format, -1 where it has none
  CodeFamily codes;
  ScaleRule scale_rule;
  int zero_point;
  BlockLayout fields;
  // Whether the format needs zero points beside its blocks and scales.
  bool takes_zeros = false;

  // Whether its scales are a tensor of their own; the order in which a quantiser sorted the columns
  // may then be one too.
  constexpr bool takes_scales() const { return scale_rule == ScaleRule::kGroup; }
};

namespace format_table {
using enum CodeFamily;
using enum ScaleRule;
// clang-format off: one format a line
constexpr FormatDescriptor kFormats[] = {
  //                            zero  block      quants     high_bits  sub_scales scale     min
  {"Q4_0",    2, kU4, kBlock,      8, { 32,  18, {2, 16},   {},        {},        {0, 2},   {}}},
  {"Q4_1",    3, kU4, kBlock,      0, { 32,  20, {4, 16},   {},        {},        {0, 2},   {2, 2}}},
  {"Q5_0",    6, kU5, kBlock,     16, { 32,  22, {6, 16},   {2, 4},    {},        {0, 2},   {}}},
  {"Q5_1",    7, kU5, kBlock,      0, { 32,  24, {8, 16},   {4, 4},    {},        {0, 2},   {2, 2}}},
  {"Q8_0",    8, kS8, kBlock,      0, { 32,  34, {2, 32},   {},        {},        {0, 2},   {}}},
  {"Q4_K",   12, kU4, kSubBlock32, 0, {256, 144, {16, 128}, {},        {4, 12},   {0, 2},   {2, 2}}},
  {"Q5_K",   13, kU5, kSubBlock32, 0, {256, 176, {48, 128}, {16, 32},  {4, 12},   {0, 2},   {2, 2}}},
  {"Q6_K",   14, kU6, kSubBlock16, 32, {256, 210, {0, 128}, {128, 64}, {192, 16}, {208, 2}, {}}},
  {"Q2_K",   10, kU2, kSubBlock16Four, 0, {256,  84, {16, 64}, {}, {0, 16}, {80, 2}, {82, 2}}},
  {"Q3_K",   11, kU3, kSubBlock16Six,  4, {256, 110, {32, 64}, {0, 32}, {96, 12}, {108, 2}, {}}},
  {"IQ4_NL", 20, kIq4, kBlock,         0, { 32,  18, {2, 16}, {}, {}, {0, 2}, {}}},
  {"IQ4_XS", 23, kIq4, kSubBlock32Six, 0, {256, 136, {8, 128}, {}, {4, 4}, {0, 2}, {}, {2, 2}}},
  {"MXFP4",  39, kE2m1, kExponent,     0, { 32,  17, {1, 16}, {}, {}, {0, 1}, {}}},
  {"TQ1_0",  34, kTernary, kBlock,     1, {256,  54, {0, 52}, {}, {}, {52, 2}, {}}},
  {"TQ2_0",  35, kU2, kBlock,          1, {256,  66, {0, 64}, {}, {}, {64, 2}, {}}},
  {"U4",     -1, kU4, kGroup,          0, { 32,  16, {0, 16}, {}, {}, {}, {}}, true},
  {"S4",     -1, kU4, kGroup,          8, { 32,  16, {0, 16}, {}, {}, {}, {}}},
  {"S8",     -1, kS8, kGroup,          0, { 32,  32, {0, 32}, {}, {}, {}, {}}},
  {"E4M3",   -1, kE4m3, kGroup,        0, { 32,  32, {0, 32}, {}, {}, {}, {}}},
  {"NF4",    -1, kNf4, kGroup,         0, { 32,  16, {0, 16}, {}, {}, {}, {}}},
  {"FP4",    -1, kFp4, kGroup,         0, { 32,  16, {0, 16}, {}, {}, {}, {}}},
};
// clang-format on
}  // namespace format_table
using format_table::kFormats;
constexpr int kNumFormats = sizeof(kFormats) / sizeof(kFormats[0]);

static constexpr BlockLayout block_layout(int format) {
  return with_packed_offsets(kFormats[format].fields);
}

// A code a byte.
static constexpr bool is_byte(CodeFamily codes) {
  return codes == CodeFamily::kS8 || codes == CodeFamily::kE4m3;
}
// A nibble that names a float32 value.
static constexpr bool has_float_table(CodeFamily codes) {
  return codes == CodeFamily::kNf4 || codes == CodeFamily::kFp4;
}
// Codes that products in int8 cannot take.
static constexpr bool is_floating(CodeFamily codes) {
  return codes == CodeFamily::kE4m3 || has_float_table(codes);
}

// What makes the signed codes of a family unsigned: int8 goes with its sign bit flipped.
static constexpr int code_offset(CodeFamily codes) {
  if (codes == CodeFamily::kS8 || codes == CodeFamily::kIq4) return 128;
  return codes == CodeFamily::kE2m1 ? 12 : 0;
}

// What kernels subtract from a code read as unsigned.
static constexpr int unsigned_zero_point(const FormatDescriptor& format) {
  return format.zero_point + code_offset(format.codes);
}

// The 16 codes that a nibble names, code_offset added: those of nibbles 0 .. 7 in the bytes of low,
// first in the lowest.
struct CodeTable {
  uint64_t low;
  uint64_t high;
};
static constexpr bool has_code_table(CodeFamily codes) {
  return codes == CodeFamily::kIq4 || codes == CodeFamily::kE2m1;
}
static constexpr CodeTable code_table(CodeFamily codes) {
  constexpr int kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                            1,    13,   25,  38,  53,  69,  89,  113};
  constexpr int kE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  CodeTable table{};
  for (int i = 0; i < 16; ++i) {
    const int value = codes == CodeFamily::kIq4 ? kIq4[i] : kE2m1[i];
    const auto byte = static_cast<uint64_t>(value + code_offset(codes)) << (8 * (i % 8));
    (i < 8 ? table.low : table.high) |= byte;
  }
  return table;
}

// bitsandbytes' values of four bits, as float32: NF4's are quantiles of the normal distribution
// (Dettmers et al. 2023, arXiv:2305.14314), FP4's have a sign, two bits of exponent and one of
// mantissa, and 12 as the largest, by which they are divided.
struct FloatTable {
  float values[16];
};
static constexpr FloatTable float_table(CodeFamily codes) {
  if (codes == CodeFamily::kNf4) {
    return {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
             -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
             0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
             0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}};
  }
  constexpr float kTwelfths[8] = {0.0f, 0.0625f, 8.0f, 12.0f, 4.0f, 6.0f, 2.0f, 3.0f};
  FloatTable table{};
  for (int i = 0; i < 8; ++i) {
    table.values[i] = kTwelfths[i] / 12.0f;
    table.values[8 + i] = i == 0 ? 0.0f : -table.values[i];
  }
  return table;
}

// Whether 16 weights share a scale, and a minimum where there is one; else 32 or a block do.
static constexpr bool has_scale_per_16(ScaleRule rule) {
  return rule == ScaleRule::kSubBlock16 || rule == ScaleRule::kSubBlock16Six ||
         rule == ScaleRule::kSubBlock16Four;
}
// Whether the whole block has one.
static constexpr bool has_one_scale(ScaleRule rule) {
  return rule == ScaleRule::kBlock || rule == ScaleRule::kExponent || rule == ScaleRule::kGroup;
}

// Whether the decoders know the row's combination of codes, scales and block; they static_assert
// it.
static constexpr bool is_decodable(const FormatDescriptor& format) {
  using enum ScaleRule;
  const ScaleRule rule = format.scale_rule;
  const int block_size = format.fields.block_size;
  const bool subtracts_min = rule == kSubBlock32 || rule == kSubBlock16Four;
  if (rule != kBlock && subtracts_min != (format.fields.min.bytes > 0)) return false;
  if (rule == kGroup) {
    return block_size == 32 && (format.codes == CodeFamily::kU4 || is_byte(format.codes) ||
                                has_float_table(format.codes));
  }
  switch (format.codes) {
    case CodeFamily::kU4:
    case CodeFamily::kU5:
      return (rule == kBlock && block_size == 32) || (rule == kSubBlock32 && block_size == 256);
    case CodeFamily::kU6: return rule == kSubBlock16 && block_size == 256;
    case CodeFamily::kS8: return rule == kBlock && block_size == 32;
    case CodeFamily::kU2: return (rule == kBlock || rule == kSubBlock16Four) && block_size == 256;
    case CodeFamily::kU3: return rule == kSubBlock16Six && block_size == 256;
    case CodeFamily::kIq4:
      return (rule == kBlock && block_size == 32) || (rule == kSubBlock32Six && block_size == 256);
    case CodeFamily::kE2m1: return rule == kExponent && block_size == 32;
    case CodeFamily::kTernary: return rule == kBlock && block_size == 256;
    case CodeFamily::kE4m3:
    case CodeFamily::kNf4:
    case CodeFamily::kFp4: return false;  // only with scales beside the blocks
  }
  return false;
}

// The kernels of each set are compiled in files of their own, so that none takes long.
enum class FormatSet : int8_t {
  kBlocks,  // blocks hold their scales
  kWide,    // of kBlocks: integer codes of four bits or more
  kLowBit,  // of kBlocks: two or three bits, ternary digits, tables of 16 values
  kGroups,  // scales are a tensor of their own
};
static constexpr bool is_low_bit(CodeFamily codes) {
  return codes != CodeFamily::kU4 && codes != CodeFamily::kU5 && codes != CodeFamily::kU6 &&
         !is_byte(codes) && !has_float_table(codes);
}
static constexpr FormatSet format_set(const FormatDescriptor& format) {
  if (format.takes_scales()) return FormatSet::kGroups;
  return is_low_bit(format.codes) ? FormatSet::kLowBit : FormatSet::kWide;
}
static constexpr bool is_in_set(FormatSet set, const FormatDescriptor& format) {
  const FormatSet narrow = format_set(format);
  return set == narrow || (set == FormatSet::kBlocks && narrow != FormatSet::kGroups);
}

template <int... kRows>
static constexpr IntMenu<kRows...> format_menu(std::integer_sequence<int, kRows...>) {
  return {};
}

// Calls body(std::integral_constant<int, format>{}) for a row of kFormats that is in the set.
template <FormatSet kSet, typename Body>
static inline void dispatch_format(int format, Body&& body) {
  using Rows = decltype(format_menu(std::make_integer_sequence<int, kNumFormats>{}));
  Rows::dispatch(format, [&](auto row) {
    if constexpr (is_in_set(kSet, kFormats[row()])) body(row);
  });
}

}  // namespace llamatelemetry
