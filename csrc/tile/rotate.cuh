// The arithmetic of rotary embeddings, rounded as transformers rounds it.
#pragma once

#include "tile/vector.cuh"

namespace llamatelemetry {

// a * b + sign * c * d as three operations on Ts.
template <typename V>
__device__ inline V rounded_sum_of_products(const V& a, const V& b, float sign, const V& c,
                                            const V& d) {
  const V ab = map_vector(a, b, [](float x, float y) { return __fmul_rn(x, y); });
  const V cd = map_vector(c, d, [sign](float x, float y) { return __fmul_rn(sign * x, y); });
  return map_vector(ab, cd, [](float x, float y) { return x + y; });
}

}  // namespace llamatelemetry
