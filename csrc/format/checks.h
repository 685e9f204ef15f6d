// The checks of packed weights that rooms share.
#pragma once

#include "binding/checks.h"
#include "format/layout.h"

namespace llamatelemetry {

inline QuantLayout check_format(const char* op, int64_t format) {
  check(GgufFormats::contains(format), op, "format",
        "be a GGML type number of " + GgufFormats::text(), std::to_string(format));
  return quant_layout(static_cast<int>(format));
}

// Bytes of a row of k weights.
inline int64_t check_row_bytes(const char* op, const QuantLayout& layout, int64_t k) {
  check(k >= 0 && k % layout.block_size == 0, op, "k",
        "be a multiple of " + std::to_string(layout.block_size) + " for " + layout.name,
        std::to_string(k));
  return k / layout.block_size * layout.block_bytes;
}

inline int64_t num_tiles(int64_t n) { return (n + kTileRows - 1) / kTileRows; }

// packed is what repack makes of [n, k] weights.
inline void check_packed(const char* op, const Tensor& packed, const QuantLayout& layout, int64_t n,
                         int64_t k) {
  check(n >= 0, op, "n", "be at least 0", std::to_string(n));
  check_dtype(op, "packed", packed, ScalarType::Byte);
  check_shape(op, "packed", packed, "[ceil(n / 16), 16 * row_bytes]",
              {num_tiles(n), kTileRows * check_row_bytes(op, layout, k)});
  check_contiguous(op, "packed", packed);
  const auto misaligned = reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16;
  check(misaligned == 0, op, "packed", "start at a multiple of 16 bytes",
        std::to_string(misaligned) + " bytes past one; call .clone()");
}

}  // namespace llamatelemetry
