// From the sums of a product to what is stored: scales, bias, c, one rounding.
#pragma once

#include <type_traits>

#include "gemm/product/params.h"
#include "tile/convert.cuh"

namespace llamatelemetry {

// The scales of the blocks that a lane's two rows of a fragment, 8 apart, meet along k; rows past
// the last have its.
struct BlockScales {
  const float* low;
  const float* high;
  const float* columns;

  BlockScales() = default;
  __device__ BlockScales(const ProductParams& p, int64_t row, int64_t column) {
    const int64_t blocks = (p.k + kScaleBlock - 1) / kScaleBlock;
    low = p.row_blocks + min(row, p.m - 1) * blocks;
    high = p.row_blocks + min(row + 8, p.m - 1) * blocks;
    columns = p.column_blocks + min(column, p.n - 1) / kScaleBlock * blocks;
  }
  __device__ float2 of(int64_t block) const {
    const float of_columns = columns[block];
    return {low[block] * of_columns, high[block] * of_columns};
  }
};

// values to out[at ...]: 16 bytes at a time where that many lie together.
template <int kCount>
__device__ inline void store_columns(const ProductParams& p, int64_t at, int count,
                                     const float (&values)[kCount]) {
  const bool whole = count == kCount && at % kCount == 0;
  if (p.out_type == ProductOut::kFloat32) {
    float* out = static_cast<float*>(p.out) + at;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      if (whole) {
        *reinterpret_cast<float4*>(out + i) =
            float4{values[i], values[i + 1], values[i + 2], values[i + 3]};
        continue;
      }
#pragma unroll
      for (int j = i; j < i + 4; ++j) {
        if (j < count) out[j] = values[j];
      }
    }
    return;
  }
  const bool half = p.out_type == ProductOut::kFloat16;
  uint32_t words[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    words[i] = half ? pack_two(values[2 * i], values[2 * i + 1], Half{})
                    : pack_two(values[2 * i], values[2 * i + 1], BFloat16{});
  }
  uint16_t* out = static_cast<uint16_t*>(p.out) + at;
  if (whole) {
#pragma unroll
    for (int i = 0; i < kCount / 2; i += 2) {
      reinterpret_cast<uint2*>(out)[i / 2] = uint2{words[i], words[i + 1]};
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) out[i] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
  }
}

// Element i of a row of out's type, as a float.
__device__ inline float load_as_out(const ProductParams& p, const void* row, int64_t i) {
  switch (p.out_type) {
    case ProductOut::kFloat16: return to_float(static_cast<const Half*>(row)[i]);
    case ProductOut::kBFloat16: return to_float(static_cast<const BFloat16*>(row)[i]);
    default: return static_cast<const float*>(row)[i];
  }
}

// Where row `row` of c starts.
__device__ inline const void* row_of_c(const ProductParams& p, int64_t batch, int64_t row) {
  const int64_t at = batch * p.c_batch_stride + row * p.c_row_stride;
  return static_cast<const char*>(p.c) + at * (p.out_type == ProductOut::kFloat32 ? 4 : 2);
}

// The sums of columns `column` to column + kCount of a row become out's.
template <int kCount, typename Sum>
__device__ inline void emit(const ProductParams& p, int64_t batch, int64_t row, int64_t column,
                            const Sum (&sums)[kCount]) {
  if (row >= p.m || column >= p.n) return;
  const int64_t left = p.n - column;
  const int count = left < kCount ? static_cast<int>(left) : kCount;
  const int64_t at = (batch * p.m + row) * p.n + column;
  if (p.out_type == ProductOut::kInt32) {
    int* out = static_cast<int*>(p.out) + at;
    const bool whole = count == kCount && at % 4 == 0;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      if (whole) {
        *reinterpret_cast<int4*>(out + i) =
            int4{static_cast<int>(sums[i]), static_cast<int>(sums[i + 1]),
                 static_cast<int>(sums[i + 2]), static_cast<int>(sums[i + 3])};
        continue;
      }
#pragma unroll
      for (int j = i; j < i + 4; ++j) {
        if (j < count) out[j] = static_cast<int>(sums[j]);
      }
    }
    return;
  }
  const float scale = p.row_scales ? p.alpha * p.row_scales[row] : p.alpha;
  const void* c = p.c ? row_of_c(p, batch, row) : nullptr;
  float values[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float value = scale * static_cast<float>(sums[i]);
    if (i < count) {
      if (p.column_scales) value *= p.column_scales[column + i];
      if (p.bias) value += load_as_out(p, p.bias, column + i);
      if (c) value = fmaf(p.beta, load_as_out(p, c, column + i), value);
    }
    values[i] = value;
  }
  store_columns(p, at, count, values);
}

// What multiplies and what is added to the kCount columns that a lane stores of every row.
template <int kCount>
struct ColumnTerms {
  float scales[kCount];
  float bias[kCount];

  __device__ ColumnTerms(const ProductParams& p, int64_t column) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scales[i] = p.column_scales ? p.column_scales[column + i] : 1.0f;
      bias[i] = p.bias ? load_as_out(p, p.bias, column + i) : 0.0f;
    }
  }
};

// 16 bytes of out.
__device__ inline void store_unit(float* out, const float (&v)[4]) {
  *reinterpret_cast<float4*>(out) = float4{v[0], v[1], v[2], v[3]};
}
template <typename T>
__device__ inline void store_unit(T* out, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(out) = uint4{pack_two(v[0], v[1], T{}), pack_two(v[2], v[3], T{}),
                                         pack_two(v[4], v[5], T{}), pack_two(v[6], v[7], T{})};
}

// A warp's 16 rows of kColumns sums in shared memory, between the fragments that the matrix
// instructions leave and rows as they are stored. Rows trade blocks of 8 columns, so that neither
// way meets in one bank.
template <int kColumns, typename Sum>
struct StagedRows {
  static constexpr int kRows = 16;
  static constexpr int kUnit = 8;  // columns that a lane stores at a time
  Sum* s;                          // [kRows][kColumns]

  static constexpr int bytes() { return kRows * kColumns * sizeof(Sum); }
  static __device__ int place(int row, int column) {
    return row * kColumns + (column ^ (row % 4 * kUnit));
  }

  // The four values of a fragment, whose columns start at `column`.
  __device__ void put(int lane, int column, Sum v0, Sum v1, Sum v2, Sum v3) {
    struct alignas(2 * sizeof(Sum)) Two {
      Sum low, high;
    };
    const int row = lane / 4, at = column + lane % 4 * 2;
    *reinterpret_cast<Two*>(s + place(row, at)) = Two{v0, v1};
    *reinterpret_cast<Two*>(s + place(row + 8, at)) = Two{v2, v3};
  }

  // To out[first_row ..., first_column ...].
  __device__ void store(const ProductParams& p, int lane, int64_t batch, int64_t first_row,
                        int64_t first_column) {
    __syncwarp();
    if (p.c != nullptr || p.n % kUnit != 0) {
      store_any(p, lane, batch, first_row, first_column);
    } else if (p.out_type == ProductOut::kInt32) {
      store_units(p, lane, batch, first_row, first_column, static_cast<int*>(p.out));
    } else if (p.out_type == ProductOut::kFloat32) {
      store_units(p, lane, batch, first_row, first_column, static_cast<float*>(p.out));
    } else if (p.out_type == ProductOut::kFloat16) {
      store_units(p, lane, batch, first_row, first_column, static_cast<Half*>(p.out));
    } else {
      store_units(p, lane, batch, first_row, first_column, static_cast<BFloat16*>(p.out));
    }
    __syncwarp();
  }

 private:
  struct alignas(16) Four {
    Sum value[4];
  };

  // Whole units of 16 bytes of out, whose columns a lane keeps for all its rows.
  template <typename Out>
  __device__ void store_units(const ProductParams& p, int lane, int64_t batch, int64_t first_row,
                              int64_t first_column, Out* out) {
    constexpr int kCount = 16 / sizeof(Out), kLanesOfRow = kColumns / kCount;
    constexpr int kRowsAtOnce = 32 / kLanesOfRow;
    const int first = lane / kLanesOfRow, unit = lane % kLanesOfRow * kCount;
    const int64_t column = first_column + unit;
    if (column >= p.n) return;
    const auto rows = static_cast<int>(min(p.m - first_row, static_cast<int64_t>(kRows)));
    out += (batch * p.m + first_row + first) * p.n + column;
    if constexpr (std::is_same_v<Out, int>) {
#pragma unroll
      for (int row = first; row < first + kRows; row += kRowsAtOnce, out += kRowsAtOnce * p.n) {
        if (row >= rows) return;
        *reinterpret_cast<Four*>(out) = *reinterpret_cast<const Four*>(s + place(row, unit));
      }
    } else {
      const ColumnTerms<kCount> terms(p, column);
#pragma unroll
      for (int row = first; row < first + kRows; row += kRowsAtOnce, out += kRowsAtOnce * p.n) {
        if (row >= rows) return;
        const Four* from = reinterpret_cast<const Four*>(s + place(row, unit));
        const float scale = p.row_scales ? p.alpha * p.row_scales[first_row + row] : p.alpha;
        float values[kCount];
#pragma unroll
        for (int i = 0; i < kCount / 4; ++i) {
          const Four four = from[i];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int at = 4 * i + e;
            const auto sum = static_cast<float>(four.value[e]);
            values[at] = scale * sum * terms.scales[at] + terms.bias[at];
          }
        }
        store_unit(out, values);
      }
    }
  }

  __device__ void store_any(const ProductParams& p, int lane, int64_t batch, int64_t first_row,
                            int64_t first_column) {
    constexpr int kUnitsOfRow = kColumns / kUnit;
#pragma unroll 1
    for (int unit = lane; unit < kRows * kUnitsOfRow; unit += 32) {
      const int row = unit / kUnitsOfRow, column = unit % kUnitsOfRow * kUnit;
      Sum sums[kUnit];
      const Four* from = reinterpret_cast<const Four*>(s + place(row, column));
#pragma unroll
      for (int i = 0; i < kUnit; ++i) sums[i] = from[i / 4].value[i % 4];
      emit(p, batch, first_row + row, first_column + column, sums);
    }
  }
};

}  // namespace llamatelemetry
