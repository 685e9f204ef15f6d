// What Python must know of C++, written once: the formats, levels, dtypes and limits as JSON, which
// llamatelemetry/_native/facts.py reads once. Torch-free.
#include <charconv>
#include <iterator>
#include <string>

#include "attention/choice.h"
#include "common/backend.h"
#include "common/dtype.h"
#include "cpu/isa.h"
#include "format/format.h"

namespace llamatelemetry {
namespace {

std::string quoted(const char* name) {
  std::string text = "\"";
  text += name;
  return text += "\"";
}

// Items that next(i) gives for 0 .. count - 1, in brackets.
template <typename Next>
std::string list(int count, Next&& next) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += next(i);
  }
  return text + "]";
}

// "key": value, and a comma before it unless it comes first.
void add(std::string& object, const char* key, const std::string& value) {
  object += object.empty() ? "{" : ", ";
  object += quoted(key);
  object += ": ";
  object += value;
}

std::string fields_of(const BlockLayout& layout) {
  std::string text;
  const auto add_field = [&](const char* name, const QuantField& field) {
    if (field.bytes == 0) return;
    add(text, name, list(2, [&](int i) { return std::to_string(i ? field.bytes : field.offset); }));
  };
  add_field("quants", layout.quants);
  add_field("high_bits", layout.high_bits);
  add_field("sub_scales", layout.sub_scales);
  add_field("scale", layout.scale);
  add_field("min", layout.min);
  add_field("sub_scales_high", layout.sub_scales_high);
  return text + "}";
}

// The fewest digits that say which float32 it is, with a point whatever the locale.
std::string number(float value) {
  char digits[32];
  return std::string(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
}

std::string format_facts(const FormatDescriptor& format) {
  std::string text;
  add(text, "name", quoted(format.name));
  add(text, "ggml_type", format.ggml_type < 0 ? "null" : std::to_string(format.ggml_type));
  add(text, "codes", quoted(code_family_name(format.codes)));
  add(text, "scale_rule", quoted(scale_rule_name(format.scale_rule)));
  add(text, "zero_point", std::to_string(format.zero_point));
  add(text, "block_size", std::to_string(format.fields.block_size));
  add(text, "block_bytes", std::to_string(format.fields.block_bytes));
  add(text, "fields", fields_of(format.fields));
  if (has_float_table(format.codes)) {
    const FloatTable table = float_table(format.codes);
    add(text, "values", list(16, [&](int i) { return number(table.values[i]); }));
  }
  return text + "}";
}

std::string limits() {
  std::string text;
  add(text, "tile_rows", std::to_string(kTileRows));
  add(text, "max_head_dim", std::to_string(kMaxHeadDim));
  add(text, "head_dim_multiple", std::to_string(kHeadDimMultiple));
  add(text, "max_split_queries", std::to_string(kMaxSplitQueries));
  return text + "}";
}

std::string facts() {
  const auto dtype = [](int i) { return quoted(dtype_name(static_cast<DType>(i))); };
  std::string text;
  add(text, "formats", list(kNumFormats, [](int i) { return format_facts(kFormats[i]); }));
  add(text, "cpu_levels", list(std::size(kIsaNames), [](int i) { return quoted(kIsaNames[i]); }));
  add(text, "dtypes", list(kNumDTypes, dtype));
  add(text, "attention_backends",
      list(std::size(kNamedImpls), [](int i) { return quoted(kNamedImpls[i].name); }));
  add(text, "limits", limits());
  return text + "}";
}

}  // namespace
}  // namespace llamatelemetry

LT_EXPORT const char* lt_facts() {
  static const std::string text = llamatelemetry::facts();
  return text.c_str();
}
