// q[r, :] = round(x[r, :] / scales[r]), scales[r] = max |x[r, :]| / 127 (int8) or 448 (e4m3), or so
// for each block of a row. One with NaN or infinity has the scale NaN. An item is a row, read
// twice.
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "norm/quantize_params.h"
#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

int8_t to_int8(float x) {
  const float whole = std::nearbyintf(x);
  return static_cast<int8_t>(whole < -127.0f ? -127.0f : whole > 127.0f ? 127.0f : whole);
}

// Nearest, ties to even, no value beyond 448: an e4m3 has 3 bits of mantissa, the exponent -6 for
// the least normal number, and steps of 2^-9 below that.
uint8_t to_e4m3(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 24 & 0x80;
  const float size = std::fabs(x);
  if (size < 0x1p-6f) {
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::nearbyintf(size * 512.0f)));
  }
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t rounded = (magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  const uint32_t code = rounded - ((127 - 7) << 3);
  return static_cast<uint8_t>(sign | (code < 0x7e ? code : 0x7e));
}

// size values that share a scale, which it returns.
template <typename T>
float quantize_block(const T* x, uint8_t* q, int64_t size, DType to) {
  float largest = 0.0f, poison = 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    const float value = to_float(x[i]);
    poison += value * 0.0f;  // NaN once any is NaN or infinite
    largest = std::fabs(value) > largest ? std::fabs(value) : largest;
  }
  const float scale = largest / largest_of(to) + poison;
  const float inverse = scale >= std::numeric_limits<float>::min() ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    const float value = inverse == 0.0f ? 0.0f : to_float(x[i]) * inverse;
    q[i] = to == DType::kInt8 ? static_cast<uint8_t>(to_int8(value)) : to_e4m3(value);
  }
  return scale;
}

template <typename T>
void quantize_row(const QuantizeRowsParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  auto* q = static_cast<uint8_t*>(p.q) + row * p.row_size;
  const int64_t count = scales_a_row(p.in_blocks, p.row_size);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t first = b * kQuantizeBlock, left = p.row_size - first;
    const int64_t size = p.in_blocks && left > kQuantizeBlock ? kQuantizeBlock : left;
    p.scales[row * count + b] = quantize_block(x + first, q + first, size, p.to);
  }
}

void quantize_items(const QuantizeRowsParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) {
      quantize_row<typename decltype(type)::type>(p, row);
    }
  });
}

}  // namespace

Error launch_quantize_rows(const QuantizeRowsParams& p, Stream) {
  const Work work{p.num_rows, 20.0 + 1.0 * static_cast<double>(p.row_size)};
  parallel_over<quantize_items>("quantize_rows", work, p);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_quantize_rows, QuantizeRowsParams)
