// The 16 values that codes of quant_stream.cuh name, as its kernel takes them.
#pragma once

#include "format/format.h"

namespace llamatelemetry {

// Whether a nibble names one of 16 values, which 16 bits hold exactly but for a common factor. Not
// so NF4's: a column of its weights would not be what dequantize has, rounded once.
static inline constexpr bool is_stream_table(CodeFamily codes) {
  return has_code_table(codes) || codes == CodeFamily::kFp4;
}

// A value is values[i], which float16 and bfloat16 have exactly, times unit: FP4's are twelfths.
struct StreamTable {
  float values[16];
  float unit;
};

static inline constexpr StreamTable stream_table(CodeFamily codes) {
  StreamTable table{};
  table.unit = 1;
  if (codes == CodeFamily::kFp4) {
    constexpr float kTwelve = 12;
    table.unit = 1 / kTwelve;
    for (int i = 0; i < 16; ++i) table.values[i] = float_table(codes).values[i] * kTwelve;
  } else if (has_code_table(codes)) {
    const CodeTable bytes = code_table(codes);
    for (int i = 0; i < 16; ++i) {
      const auto byte = static_cast<int>((i < 8 ? bytes.low : bytes.high) >> (8 * (i % 8)) & 0xff);
      table.values[i] = static_cast<float>(byte - code_offset(codes));
    }
  }
  return table;
}

}  // namespace llamatelemetry
