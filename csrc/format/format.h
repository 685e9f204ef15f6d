// The quantised weight formats: a format is one row of kFormats and stands nowhere else in C++.
//
//   weight = scale * (code - zero_point)          without a minimum
//   weight = scale * (code - zero_point) +- min   with one; the scale rule says the sign
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
  kU4,  // a nibble
  kU5,  // a nibble, and the fifth bit in a plane of its own (high_bits)
  kU6,  // a nibble, and two bits in planes of their own
  kS8,  // int8
};

// How many weights share a scale, and how it is stored.
enum class ScaleRule : int8_t {
  kBlock,       // d of the block; its minimum is added
  kSubBlock32,  // 32 weights: d times a 6-bit integer; dmin times another is subtracted
  kSubBlock16,  // 16 weights: d times an int8; no minimum
};

static constexpr const char* code_family_name(CodeFamily codes) {
  switch (codes) {
    case CodeFamily::kU4: return "u4";
    case CodeFamily::kU5: return "u5";
    case CodeFamily::kU6: return "u6";
    case CodeFamily::kS8: return "s8";
  }
  return "unknown";
}

static constexpr const char* scale_rule_name(ScaleRule rule) {
  switch (rule) {
    case ScaleRule::kBlock: return "block";
    case ScaleRule::kSubBlock32: return "sub_block32";
    case ScaleRule::kSubBlock16: return "sub_block16";
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
  // Tensors that the format needs beside its blocks: scales or zero points per group, and the order
  // in which a quantiser sorted the columns.
  bool takes_scales = false;
  bool takes_zeros = false;
  bool takes_perm = false;
};

namespace format_table {
using enum CodeFamily;
using enum ScaleRule;
// clang-format off: one format a line
constexpr FormatDescriptor kFormats[] = {
  //                          zero  block      quants     high_bits  sub_scales scale     min
  {"Q4_0",  2, kU4, kBlock,       8, { 32,  18, {2, 16},   {},        {},        {0, 2},   {}}},
  {"Q4_1",  3, kU4, kBlock,       0, { 32,  20, {4, 16},   {},        {},        {0, 2},   {2, 2}}},
  {"Q5_0",  6, kU5, kBlock,      16, { 32,  22, {6, 16},   {2, 4},    {},        {0, 2},   {}}},
  {"Q5_1",  7, kU5, kBlock,       0, { 32,  24, {8, 16},   {4, 4},    {},        {0, 2},   {2, 2}}},
  {"Q8_0",  8, kS8, kBlock,       0, { 32,  34, {2, 32},   {},        {},        {0, 2},   {}}},
  {"Q4_K", 12, kU4, kSubBlock32,  0, {256, 144, {16, 128}, {},        {4, 12},   {0, 2},   {2, 2}}},
  {"Q5_K", 13, kU5, kSubBlock32,  0, {256, 176, {48, 128}, {16, 32},  {4, 12},   {0, 2},   {2, 2}}},
  {"Q6_K", 14, kU6, kSubBlock16, 32, {256, 210, {0, 128},  {128, 64}, {192, 16}, {208, 2}, {}}},
};
// clang-format on
}  // namespace format_table
using format_table::kFormats;
constexpr int kNumFormats = sizeof(kFormats) / sizeof(kFormats[0]);

static constexpr BlockLayout block_layout(int format) {
  return with_packed_offsets(kFormats[format].fields);
}

// What kernels subtract from a code read as unsigned: int8 goes with its sign bit flipped.
static constexpr int unsigned_zero_point(const FormatDescriptor& format) {
  return format.zero_point + (format.codes == CodeFamily::kS8 ? 128 : 0);
}

// Whether the decoders know the row's combination of codes, scales and block; they static_assert
// it.
static constexpr bool is_decodable(const FormatDescriptor& format) {
  const bool one_block = format.scale_rule == ScaleRule::kBlock;
  const int block_size = format.fields.block_size;
  if (format.scale_rule == ScaleRule::kSubBlock16 && format.fields.min.bytes > 0) return false;
  switch (format.codes) {
    case CodeFamily::kU4:
    case CodeFamily::kU5: return block_size == (one_block ? 32 : 256);
    case CodeFamily::kU6: return block_size == 256 && format.scale_rule == ScaleRule::kSubBlock16;
    case CodeFamily::kS8: return block_size == 32 && one_block;
  }
  return false;
}

template <int... kRows>
static constexpr IntMenu<kRows...> format_menu(std::integer_sequence<int, kRows...>) {
  return {};
}

// Calls body(std::integral_constant<int, format>{}) for a row of kFormats.
template <typename Body>
static inline void dispatch_format(int format, Body&& body) {
  using Rows = decltype(format_menu(std::make_integer_sequence<int, kNumFormats>{}));
  Rows::dispatch(format, body);
}

}  // namespace llamatelemetry
