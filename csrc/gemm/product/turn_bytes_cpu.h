// Matrices of bytes whose rows run along the other dimension, turned round.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

typedef int8_t SixteenBytes __attribute__((vector_size(16)));

// x[i] of row r becomes x[r] of row i. Each pass moves one bit of r to i, one of i to r.
LT_INLINE void turn_tile(SixteenBytes (&x)[16]) {
#pragma GCC unroll 4
  for (int pass = 0; pass < 4; ++pass) {
    SixteenBytes y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = __builtin_shufflevector(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                         6, 22, 7, 23);
      y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                             13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
}

// to[width][pitch] of from[depth][width], whose rows lie `stride` apart; whole 16 bytes of `to` are
// written, zeros behind depth. Rows of `from` are read once, side by side as they lie: of few bytes
// of each at a time a cache line would be fetched again for the next.
void turn_bytes(const uint8_t* from, int64_t stride, int depth, int width, uint8_t* to,
                int64_t pitch) {
  for (int d = 0; d < depth; d += 16) {
    for (int w = 0; w < width; w += 16) {
      const size_t count = width - w < 16 ? width - w : 16;
      SixteenBytes tile[16] = {};
      if (d + 16 <= depth && count == 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) std::memcpy(&tile[i], from + (d + i) * stride + w, 16);
      } else {
        for (int i = 0; i < 16 && d + i < depth; ++i) {
          std::memcpy(&tile[i], from + (d + i) * stride + w, count);
        }
      }
      turn_tile(tile);
      for (size_t i = 0; i < count; ++i) std::memcpy(to + (w + i) * pitch + d, &tile[i], 16);
    }
  }
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
