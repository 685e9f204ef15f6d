// Loops over a contiguous row, a vector at a time, the last one partly filled: a body is written
// once, as a generic lambda (int64_t i, auto lanes), and compiled for both.
#pragma once

#include "vec/vec.h"

namespace llamatelemetry {
namespace LT_ISA {

struct AllLanes {};

template <typename T>
LT_INLINE Vec vec_load(const T* p, AllLanes, float = 0.0f) {
  return vec_load(p);
}
template <typename T>
LT_INLINE Vec vec_load(const T* p, int lanes, float fill = 0.0f) {
  return vec_load_first(p, lanes, fill);
}
template <typename T>
LT_INLINE void vec_store(T* p, AllLanes, Vec x) {
  vec_store(p, x);
}
template <typename T>
LT_INLINE void vec_store(T* p, int lanes, Vec x) {
  vec_store_first(p, lanes, x);
}

// Calls body(i, lanes) for the elements i, i + 1, ... of a row of size elements.
template <typename RowBody>
LT_INLINE void for_each_vec(int64_t size, RowBody&& body) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= size; i += Vec::kLanes) body(i, AllLanes{});
  if (i < size) body(i, static_cast<int>(size - i));
}

// Folds a row into start: next(accumulator, i, lanes) takes one vector in, combine(a, b) joins two
// accumulators. Four of them hide the latency of an addition.
template <typename Next, typename Combine>
LT_INLINE Vec fold_row(int64_t size, Vec start, Next&& next, Combine&& combine) {
  Vec part[4] = {start, start, start, start};
  int64_t i = 0;
  for (; i + 4 * Vec::kLanes <= size; i += 4 * Vec::kLanes) {
    for (int u = 0; u < 4; ++u) part[u] = next(part[u], i + u * Vec::kLanes, AllLanes{});
  }
  for (; i + Vec::kLanes <= size; i += Vec::kLanes) part[0] = next(part[0], i, AllLanes{});
  if (i < size) part[0] = next(part[0], i, static_cast<int>(size - i));
  return combine(combine(part[0], part[1]), combine(part[2], part[3]));
}

// A sum of sums: a lane rounds some 32 times for each of them, not size / kLanes times.
template <typename Next>
LT_INLINE float sum_row(int64_t size, Next&& next) {
  constexpr int64_t kPart = 4 * 32 * Vec::kLanes;
  const auto add = [](Vec a, Vec b) { return a + b; };
  const Vec zero = vec_set(0.0f);
  Vec sum = zero;
  for (int64_t begin = 0; begin < size; begin += kPart) {
    const auto next_of_part = [&](Vec acc, int64_t i, auto lanes) {
      return next(acc, begin + i, lanes);
    };
    sum = sum + fold_row(size - begin < kPart ? size - begin : kPart, zero, next_of_part, add);
  }
  return vec_sum(sum);
}

}  // namespace LT_ISA
}  // namespace llamatelemetry
