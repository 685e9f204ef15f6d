// kElements consecutive elements, moved as one word.
#pragma once

#include <cstdint>

#include "ptx/global.cuh"
#include "tile/convert.cuh"

namespace llamatelemetry {

constexpr int kVectorBytes = 16;

template <typename T, int kNumElements>
struct alignas(kNumElements * sizeof(T)) Vector {
  static constexpr int kElements = kNumElements;
  using Element = T;
  T value[kElements];
};

template <typename T>
using WideVector = Vector<T, kVectorBytes / sizeof(T)>;

// Where all of these are multiples of it, rows can be moved in units of kVectorBytes.
template <typename T, typename... Sizes>
bool fits_wide_vectors(std::initializer_list<const void*> pointers, Sizes... sizes) {
  auto bits = static_cast<uint64_t>((static_cast<int64_t>(sizes) | ...)) * sizeof(T);
  for (const void* pointer : pointers) bits |= reinterpret_cast<uint64_t>(pointer);
  return bits % kVectorBytes == 0;
}

template <typename V>
__device__ inline V filled(float x) {
  V out;
#pragma unroll
  for (int i = 0; i < V::kElements; ++i) out.value[i] = from_float<typename V::Element>(x);
  return out;
}

// Each element of a to function(a), or of a and b to function(a, b), as floats; rounded to T.
template <typename V, typename Function>
__device__ inline V map_vector(const V& a, Function function) {
  V out;
#pragma unroll
  for (int i = 0; i < V::kElements; ++i) {
    out.value[i] = from_float<typename V::Element>(function(to_float(a.value[i])));
  }
  return out;
}
template <typename V, typename Function>
__device__ inline V map_vector(const V& a, const V& b, Function function) {
  V out;
#pragma unroll
  for (int i = 0; i < V::kElements; ++i) {
    out.value[i] =
        from_float<typename V::Element>(function(to_float(a.value[i]), to_float(b.value[i])));
  }
  return out;
}

// The sum of function(element), in pairs: a chain of log2(kElements) additions.
template <typename V, typename Function>
__device__ inline float sum_vector(const V& a, Function function) {
  float sum[V::kElements];
#pragma unroll
  for (int i = 0; i < V::kElements; ++i) sum[i] = function(to_float(a.value[i]));
#pragma unroll
  for (int width = V::kElements / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
}

// Four consecutive elements as floats.
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

// p must be a multiple of 4 * sizeof(T) bytes, in global memory.
template <typename T>
__device__ inline void store_four(T* p, const float (&values)[4]) {
  if constexpr (sizeof(T) == sizeof(float)) {
    ptx::store(p, float4{values[0], values[1], values[2], values[3]});
  } else {
    ptx::store(p, uint2{pack_two(values[0], values[1], T{}), pack_two(values[2], values[3], T{})});
  }
}

}  // namespace llamatelemetry
