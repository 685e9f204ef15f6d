// q[r, :] = round(x[r, :] / scales[r]), scales[r] = max |x[r, :]| / 127 (int8) or 448 (e4m3), or so
// for each block of a row. One with NaN or infinity has the scale NaN. An item is a row, read
// three times.
#include <cstring>
#include <limits>

#include "cpu/parallel.h"
#include "norm/quantize_params.h"
#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

constexpr int kPart = 64;  // values of a row that become bytes at a time

// Nearest, ties to even, no value beyond 448: an e4m3 has 3 bits of mantissa, the exponent -6 for
// the least normal number, and steps of 2^-9 below that. Without branches, so that the compiler
// takes a vector of them.
uint8_t to_e4m3(float x) {
  constexpr int32_t kLeastNormal = (127 - 6) << 23, kLargest = 0x7e;
  constexpr float kSteps = 0x1p14f;  // a float32 there has steps of 2^-9: an addition rounds to one
  const auto bits = static_cast<int32_t>(float_to_bits(x)), size = bits & 0x7fffffff;
  const int32_t normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - ((127 - 7) << 3);
  const float stepped = bits_to_float(static_cast<uint32_t>(size)) + kSteps;
  const auto subnormal = static_cast<int32_t>(float_to_bits(stepped) - float_to_bits(kSteps));
  const int32_t is_subnormal = -static_cast<int32_t>(size < kLeastNormal);  // all bits, or none
  const int32_t code = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  return static_cast<uint8_t>((bits >> 24 & 0x80) | (code < kLargest ? code : kLargest));
}

// The largest size of a value, and 0: NaN once any value is NaN or infinite.
template <typename T>
void scan(const T* x, int64_t size, float* largest, float* poison) {
  const Vec zero = vec_set(0.0f);
  const auto sizes = [=](Vec acc, int64_t i, auto lanes) {
    const Vec value = vec_load(x + i, lanes);
    return vec_max(acc, vec_flip_sign(value, value));
  };
  const auto zeros = [=](Vec acc, int64_t i, auto lanes) {
    return acc + vec_load(x + i, lanes) * zero;
  };
  *largest =
      vec_reduce_max(fold_row(size, zero, sizes, [](Vec a, Vec b) { return vec_max(a, b); }));
  *poison = vec_sum(fold_row(size, zero, zeros, [](Vec a, Vec b) { return a + b; }));
}

// size values that share a scale, which it returns.
template <typename T>
float quantize_block(const T* x, uint8_t* q, int64_t size, DType to) {
  float largest, poison;
  scan(x, size, &largest, &poison);
  const float scale = largest / largest_of(to) + poison;
  if (!(scale >= std::numeric_limits<float>::min())) {
    std::memset(q, 0, static_cast<size_t>(size));
    return scale;
  }
  const Vec inverse = vec_set(1.0f / scale), most = vec_set(127.0f), least = vec_set(-127.0f);
  for (int64_t first = 0; first < size; first += kPart) {
    const int64_t count = size - first < kPart ? size - first : kPart;
    alignas(64) float values[kPart] = {};
    uint8_t bytes[kPart];
    for_each_vec(count, [&](int64_t i, auto lanes) {
      vec_store(values + i, vec_load(x + first + i, lanes) * inverse);
    });
    if (to == DType::kInt8) {
      for (int i = 0; i < kPart; i += Vec::kLanes) {
        const Vec whole = vec_round(vec_load(values + i));
        vec_store_int8(reinterpret_cast<int8_t*>(bytes) + i, vec_min(most, vec_max(least, whole)));
      }
    } else {
      for (int i = 0; i < kPart; ++i) bytes[i] = to_e4m3(values[i]);
    }
    std::memcpy(q + first, bytes, static_cast<size_t>(count));
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
  const Work work{p.num_rows, 20.0 + 0.4 * static_cast<double>(p.row_size)};
  parallel_over<quantize_items>("quantize_rows", work, p);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_quantize_rows, QuantizeRowsParams)
