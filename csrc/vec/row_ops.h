// What norms, rotary embeddings and cache writes do to a row, with the roundings of transformers.
#pragma once

#include <cmath>

#include "vec/rows.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

// out = x / sqrt(mean(x^2) + eps) * (weight + offset). Normalises in float, rounds to T, multiplies
// by the weight in T; with an offset rounds once, as modules that have one do. out may be x.
template <typename T>
void rms_norm_row(const T* x, const T* weight, int64_t size, float eps, float offset, T* out) {
  const float sum = sum_row(size, [=](Vec acc, int64_t i, auto lanes) {
    const Vec value = vec_load(x + i, lanes);
    return vec_fma(value, value, acc);
  });
  const Vec rstd = vec_set(1.0f / std::sqrt(sum / static_cast<float>(size) + eps));
  if (offset != 0.0f) {
    const Vec added = vec_set(offset);
    for_each_vec(size, [=](int64_t i, auto lanes) {
      const Vec factor = vec_load(weight + i, lanes) + added;
      vec_store(out + i, lanes, vec_load(x + i, lanes) * rstd * factor);
    });
    return;
  }
  for_each_vec(size, [=](int64_t i, auto lanes) {
    const Vec normalised = vec_rounded_to<T>(vec_load(x + i, lanes) * rstd);
    vec_store(out + i, lanes, normalised * vec_load(weight + i, lanes));
  });
}

// a * b + c * d as three operations on Ts.
template <typename T>
LT_INLINE Vec rounded_sum_of_products(Vec a, Vec b, Vec c, Vec d) {
  return vec_rounded_to<T>(a * b) + vec_rounded_to<T>(c * d);
}

template <typename T>
void rotate_halves(T* x, const T* cos, const T* sin, int64_t half) {
  const Vec zero = vec_set(0.0f);
  for_each_vec(half, [=](int64_t i, auto lanes) {
    const int64_t j = i + half;
    const Vec first = vec_load(x + i, lanes);
    const Vec second = vec_load(x + j, lanes);
    vec_store(x + i, lanes,
              rounded_sum_of_products<T>(first, vec_load(cos + i, lanes), zero - second,
                                         vec_load(sin + i, lanes)));
    vec_store(x + j, lanes,
              rounded_sum_of_products<T>(second, vec_load(cos + j, lanes), first,
                                         vec_load(sin + j, lanes)));
  });
}

template <typename T>
void rotate_pairs(T* x, const T* cos, const T* sin, int64_t size) {
  for_each_vec(size, [=](int64_t i, auto lanes) {
    const Vec value = vec_load(x + i, lanes);
    vec_store(x + i, lanes,
              rounded_sum_of_products<T>(value, vec_load(cos + i, lanes), vec_rotate_pairs(value),
                                         vec_load(sin + i, lanes)));
  });
}

// x [rotary_dim] turned by its row of cos and sin; a null cos stands for a position that has none,
// and gives NaN.
template <typename T>
void rotate_row(T* x, const T* cos, const T* sin, int64_t rotary_dim, bool interleaved) {
  if (cos == nullptr) {
    for_each_vec(rotary_dim, [=](int64_t i, auto lanes) { vec_store(x + i, lanes, vec_set(NAN)); });
  } else if (interleaved) {
    rotate_pairs(x, cos, sin, rotary_dim);
  } else {
    rotate_halves(x, cos, sin, rotary_dim / 2);
  }
}

}  // namespace
}  // namespace LT_ISA
}  // namespace llamatelemetry
