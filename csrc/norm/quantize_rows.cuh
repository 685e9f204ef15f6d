// q[r, :] = round(y[r, :] / scales[r]), scales[r] = max |y[r, :]| / 127 (int8) or 448 (e4m3), where
// y is x, its rms_norm, that of residual += x, or its silu_and_mul, rounded to T as those round; or
// a scale for each 128 values of a row. One with NaN or infinity is NaN. Bandwidth bound, or for a
// few rows bound by latency: a block a row, of which a thread keeps kQuantizeHeld chunks of 8
// values, read once; what is longer is read and made again. Grid [num_rows].
#pragma once

#include <cuda_fp8.h>

#include <cfloat>
#include <cstdint>

#include "norm/quantize_params.h"
#include "tile/activation.cuh"
#include "tile/convert.cuh"
#include "tile/dependent_launch.cuh"
#include "tile/reduce.cuh"

namespace llamatelemetry {

constexpr int kQuantizeThreads = 256;
constexpr int kQuantizeChunk = 8;
constexpr int kQuantizeHeld = 2;  // chunks of a row that a thread keeps

struct QuantizeRowsArgs {
  QuantizeRowsParams call;
  bool aligned;  // rows are loaded 16 bytes at a time
};

// The chunks of a row that a thread keeps, as floats.
using HeldChunks = float[kQuantizeHeld][kQuantizeChunk];

// Chunk c of a row as floats, zeros behind its end.
template <typename T>
__device__ inline void load_row_chunk(const T* row, int64_t c, int64_t row_size, bool aligned,
                                      float (&values)[kQuantizeChunk]) {
  const T* from = row + c * kQuantizeChunk;
  if (aligned) {
    alignas(16) T elements[kQuantizeChunk];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(elements) / 16); ++i) {
      reinterpret_cast<uint4*>(elements)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
#pragma unroll
    for (int i = 0; i < kQuantizeChunk; ++i) values[i] = to_float(elements[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuantizeChunk; ++i) {
    values[i] = c * kQuantizeChunk + i < row_size ? to_float(from[i]) : 0.0f;
  }
}

__device__ inline uint32_t quantized(float x, DType to) {
  if (to == DType::kInt8) {
    return static_cast<uint8_t>(static_cast<int8_t>(fminf(fmaxf(rintf(x), -127.0f), 127.0f)));
  }
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

template <typename T>
__device__ inline void store_row_chunk(T* row, int64_t c, int64_t row_size, bool aligned,
                                       const float (&values)[kQuantizeChunk]) {
  T* to = row + c * kQuantizeChunk;
  alignas(16) T elements[kQuantizeChunk];
#pragma unroll
  for (int i = 0; i < kQuantizeChunk; ++i) elements[i] = from_float<T>(values[i]);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(elements) / 16); ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(elements)[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuantizeChunk; ++i) {
    if (c * kQuantizeChunk + i < row_size) to[i] = elements[i];
  }
}

// Chunk c of the row that is normed: where there is a residual, its with x added to it.
template <typename T>
__device__ inline void load_normed_chunk(const QuantizeRowsParams& p, const T* x, T* residual,
                                         int64_t c, bool aligned, float (&values)[kQuantizeChunk]) {
  load_row_chunk(x, c, p.row_size, aligned, values);
  if (residual == nullptr) return;
  float others[kQuantizeChunk];
  load_row_chunk<T>(residual, c, p.row_size, aligned, others);
#pragma unroll
  for (int i = 0; i < kQuantizeChunk; ++i) {
    values[i] = to_float(from_float<T>(others[i] + values[i]));
  }
  store_row_chunk(residual, c, p.row_size, aligned, values);
}

// 1 / the root of the mean square of a row, whose first chunks stay in held. x becomes the row that
// is normed: of the rest a thread reads what it wrote alone.
template <typename T>
__device__ inline float row_rstd(const QuantizeRowsParams& p, const T*& x, int64_t row,
                                 int64_t num_chunks, bool aligned, HeldChunks& held) {
  T* residual = p.residual ? static_cast<T*>(p.residual) + row * p.residual_row_stride : nullptr;
  float sum = 0.0f;
  const auto add = [&](const float (&values)[kQuantizeChunk]) {
#pragma unroll
    for (const float v : values) sum = fmaf(v, v, sum);
  };
#pragma unroll
  for (int h = 0; h < kQuantizeHeld; ++h) {
    const int64_t c = h * kQuantizeThreads + threadIdx.x;
    if (c >= num_chunks) continue;
    load_normed_chunk(p, x, residual, c, aligned, held[h]);
    add(held[h]);
  }
  for (int64_t c = kQuantizeHeld * kQuantizeThreads + threadIdx.x; c < num_chunks;
       c += kQuantizeThreads) {
    float values[kQuantizeChunk];
    load_normed_chunk(p, x, residual, c, aligned, values);
    add(values);
  }
  if (residual) x = residual;
  return rsqrtf(block_sum(sum) * (1.0f / static_cast<float>(p.row_size)) + p.eps);
}

// Chunk c of x becomes that of the row that is quantised, each step rounded to T.
template <typename T, RowSource kSource>
__device__ inline void make_of_chunk(const QuantizeRowsParams& p, const T* x, int64_t c, float rstd,
                                     bool aligned, float (&y)[kQuantizeChunk]) {
  const auto rounded = [](float v) { return to_float(from_float<T>(v)); };
  if constexpr (kSource != RowSource::kRow) {
    constexpr bool kNorm = kSource == RowSource::kRmsNorm;
    const T* second = kNorm ? static_cast<const T*>(p.weight) : x + p.row_size;
    float other[kQuantizeChunk];
    load_row_chunk(second, c, p.row_size, aligned, other);
#pragma unroll
    for (int i = 0; i < kQuantizeChunk; ++i) {
      if constexpr (!kNorm) {
        y[i] = rounded(rounded(Silu::of(y[i])) * other[i]);
      } else if (p.weight_offset != 0.0f) {
        y[i] = rounded(y[i] * rstd * (other[i] + p.weight_offset));
      } else {
        y[i] = rounded(rounded(y[i] * rstd) * other[i]);
      }
    }
  }
}
template <typename T, RowSource kSource>
__device__ inline void make_chunk(const QuantizeRowsParams& p, const T* x, int64_t c, float rstd,
                                  bool aligned, float (&y)[kQuantizeChunk]) {
  load_row_chunk(x, c, p.row_size, aligned, y);
  make_of_chunk<T, kSource>(p, x, c, rstd, aligned, y);
}
// The chunks that a thread keeps; of a norm they are there already, as row_rstd left them.
template <typename T, RowSource kSource>
__device__ inline void make_held(const QuantizeRowsParams& p, const T* x, int64_t num_chunks,
                                 float rstd, bool aligned, HeldChunks& held) {
#pragma unroll
  for (int h = 0; h < kQuantizeHeld; ++h) {
    const int64_t c = h * kQuantizeThreads + threadIdx.x;
    if (c >= num_chunks) continue;
    if constexpr (kSource != RowSource::kRmsNorm) {
      load_row_chunk(x, c, p.row_size, aligned, held[h]);
    }
    make_of_chunk<T, kSource>(p, x, c, rstd, aligned, held[h]);
  }
}

// inverse: 1 / scale, or 0 where the row becomes zeros.
__device__ inline void store_chunk(const QuantizeRowsParams& p, uint8_t* q, int64_t c,
                                   float inverse, const float (&y)[kQuantizeChunk]) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kQuantizeChunk; ++i) {
    const float value = inverse == 0.0f ? 0.0f : y[i] * inverse;
    words[i / 4] |= quantized(value, p.to) << 8 * (i % 4);
  }
  if (p.row_size % kQuantizeChunk == 0) {
    *reinterpret_cast<uint2*>(q + c * kQuantizeChunk) = uint2{words[0], words[1]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuantizeChunk; ++i) {
    const int64_t at = c * kQuantizeChunk + i;
    if (at < p.row_size) q[at] = static_cast<uint8_t>(words[i / 4] >> 8 * (i % 4));
  }
}

// The larger of |v| and what was the largest so far, infinity once a value is not finite.
__device__ inline float larger(float largest, float v) {
  return fabsf(v) <= FLT_MAX ? fmaxf(largest, fabsf(v)) : INFINITY;
}

// Of values whose largest size is given; inverse: as store_chunk takes it.
__device__ inline float scale_of(float largest, DType to, float& inverse) {
  const float scale = largest / largest_of(to);
  inverse = scale >= FLT_MIN && largest <= FLT_MAX ? 1.0f / scale : 0.0f;
  return largest <= FLT_MAX ? scale : NAN;
}

// A scale for each block of a row, which the chunks of half a warp make up.
template <typename T, RowSource kSource>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_blocks_kernel(const __grid_constant__ QuantizeRowsArgs args) {
  constexpr int kLanes = kQuantizeBlock / kQuantizeChunk;
  const QuantizeRowsParams& p = args.call;
  const int64_t row = blockIdx.x;
  const int64_t num_chunks = (p.row_size + kQuantizeChunk - 1) / kQuantizeChunk;
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  let_successors_start();
  wait_for_predecessors();
  HeldChunks held = {};
  float rstd = 0.0f;
  if constexpr (kSource == RowSource::kRmsNorm) {
    rstd = row_rstd(p, x, row, num_chunks, args.aligned, held);
  }
  make_held<T, kSource>(p, x, num_chunks, rstd, args.aligned, held);
  auto* q = static_cast<uint8_t*>(p.q) + row * p.row_size;
  float* scales = p.scales + row * scales_a_row(true, p.row_size);
  const auto store = [&](int64_t c, const float (&y)[kQuantizeChunk]) {
    float largest = 0.0f, inverse;
#pragma unroll
    for (const float v : y) largest = larger(largest, v);
    largest = warp_reduce<Max, kLanes>(largest);
    const float scale = scale_of(largest, p.to, inverse);
    if (c >= num_chunks) return;
    if (c % kLanes == 0) scales[c / kLanes] = scale;
    store_chunk(p, q, c, inverse, y);
  };
#pragma unroll
  for (int h = 0; h < kQuantizeHeld; ++h) store(h * kQuantizeThreads + threadIdx.x, held[h]);
  for (int64_t first = kQuantizeHeld * kQuantizeThreads; first < num_chunks;
       first += kQuantizeThreads) {
    const int64_t c = first + threadIdx.x;
    float y[kQuantizeChunk] = {};
    if (c < num_chunks) make_chunk<T, kSource>(p, x, c, rstd, args.aligned, y);
    store(c, y);
  }
}

template <typename T, RowSource kSource>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsArgs args) {
  const QuantizeRowsParams& p = args.call;
  const int64_t row = blockIdx.x;
  const int64_t num_chunks = (p.row_size + kQuantizeChunk - 1) / kQuantizeChunk;
  const int64_t first_unheld = kQuantizeHeld * kQuantizeThreads + threadIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  let_successors_start();
  wait_for_predecessors();
  HeldChunks held = {};
  float rstd = 0.0f;
  if constexpr (kSource == RowSource::kRmsNorm) {
    rstd = row_rstd(p, x, row, num_chunks, args.aligned, held);
  }
  make_held<T, kSource>(p, x, num_chunks, rstd, args.aligned, held);
  float largest = 0.0f;
  const auto look = [&](const float (&y)[kQuantizeChunk]) {
#pragma unroll
    for (const float v : y) largest = larger(largest, v);
  };
#pragma unroll
  for (int h = 0; h < kQuantizeHeld; ++h) look(held[h]);  // zeros past the end of a row
  for (int64_t c = first_unheld; c < num_chunks; c += kQuantizeThreads) {
    float y[kQuantizeChunk];
    make_chunk<T, kSource>(p, x, c, rstd, args.aligned, y);
    look(y);
  }
  largest = block_max(largest);
  float inverse;
  const float scale = scale_of(largest, p.to, inverse);
  if (threadIdx.x == 0) p.scales[row] = scale;

  auto* q = static_cast<uint8_t*>(p.q) + row * p.row_size;
#pragma unroll
  for (int h = 0; h < kQuantizeHeld; ++h) {
    const int64_t c = h * kQuantizeThreads + threadIdx.x;
    if (c < num_chunks) store_chunk(p, q, c, inverse, held[h]);
  }
  for (int64_t c = first_unheld; c < num_chunks; c += kQuantizeThreads) {
    float y[kQuantizeChunk];
    make_chunk<T, kSource>(p, x, c, rstd, args.aligned, y);
    store_chunk(p, q, c, inverse, y);
  }
}

}  // namespace llamatelemetry
