// A head's row for a cache of 8 bits, on the CPU: its scale, and its numbers rounded.
#pragma once

#include <cmath>
#include <cstring>

#include "cache/params.h"
#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

// To nearest, ties to even; what is larger than kMaxE4M3 becomes that.
uint8_t e4m3_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const auto sign = static_cast<uint8_t>(bits >> 24 & 0x80);
  const float size = std::fabs(x);
  constexpr uint8_t kNan = 0x7f, kLargest = 0x7e;
  if (size != size) return sign | kNan;
  if (size >= kMaxE4M3) return sign | kLargest;
  constexpr float kLeastNormal = 0.015625f;  // 2^-6
  if (size < kLeastNormal) return sign | static_cast<uint8_t>(std::nearbyintf(size * 512.0f));
  constexpr int kDropped = 20;  // bits of the mantissa
  constexpr uint32_t kBias = (127 - 7) << 3;
  bits &= 0x7fffffff;
  bits += (1u << (kDropped - 1)) - 1 + (bits >> kDropped & 1);
  return sign | static_cast<uint8_t>((bits >> kDropped) - kBias);
}
uint8_t int8_of(float x) {
  if (x != x) return 0;
  const float rounded = std::nearbyintf(x < -kMaxInt8 ? -kMaxInt8 : x > kMaxInt8 ? kMaxInt8 : x);
  return static_cast<uint8_t>(static_cast<int8_t>(rounded));
}

// The row of a head at a slot; sets the scale where the row has its own.
template <typename T>
void store_row_in_8_bits(const T* x, int64_t head_dim, DType stored, const CacheScales& scales,
                         int64_t page_size, int64_t slot, int64_t head, uint8_t* to) {
  float* const scale = scales.data + scale_index(scales, page_size, slot, head);
  float factor = 1.0f / *scale;
  if (!scales.is_given) {
    float largest = kLeastRowMax;
    bool is_finite = true;
    for (int64_t c = 0; c < head_dim; ++c) {
      const float size = std::fabs(to_float(x[c]));
      is_finite &= size < INFINITY;
      largest = size > largest ? size : largest;
    }
    const float limit = largest_stored(stored);
    *scale = is_finite ? largest / limit : NAN;
    factor = limit / largest;
  }
  for (int64_t c = 0; c < head_dim; ++c) {
    const float value = to_float(x[c]) * factor;
    to[c] = stored == DType::kInt8 ? int8_of(value) : e4m3_of(value);
  }
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
