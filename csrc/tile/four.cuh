// Four consecutive elements as floats.
#pragma once

#include <cstdint>

#include "tile/vector.cuh"

namespace llamatelemetry {

// aligned: p is a multiple of 4 * sizeof(T) bytes, so that one load does.
template <typename T>
__device__ inline void load_four(const T* p, bool aligned, float (&values)[4]) {
  Vector<T, 4> four;
  if (aligned) {
    four = *reinterpret_cast<const Vector<T, 4>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) four.value[i] = p[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = to_float(four.value[i]);
}

// p must be a multiple of 4 * sizeof(T) bytes.
template <typename T>
__device__ inline void store_four(T* p, const float (&values)[4]) {
  Vector<T, 4> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.value[i] = from_float<T>(values[i]);
  *reinterpret_cast<Vector<T, 4>*>(p) = four;
}

}  // namespace llamatelemetry
