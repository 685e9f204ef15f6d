// A head's row for a cache of 8 bits: its scale, and its numbers rounded.
#pragma once

#include <cuda_fp8.h>

#include "cache/params.h"
#include "tile/reduce.cuh"

namespace llamatelemetry {

__device__ inline uint8_t stored_in_8_bits(float x, DType stored) {
  if (stored == DType::kInt8) {
    const float clamped = fminf(fmaxf(x, -kMaxInt8), kMaxInt8);
    return static_cast<uint8_t>(static_cast<int8_t>(x == x ? __float2int_rn(clamped) : 0));
  }
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

// What a row is multiplied by to be stored, the same in every lane of its warp; writes its scale
// where it has its own. largest: of |x|, and whether all are finite, of this lane's elements.
__device__ inline float factor_of_row(const CacheScales& scales, int64_t page_size, int64_t slot,
                                      int64_t head, DType stored, float largest, bool is_finite) {
  float* const scale = scales.data + scale_index(scales, page_size, slot, head);
  if (scales.is_given) return 1.0f / *scale;
  largest = fmaxf(warp_reduce<Max>(largest), kLeastRowMax);
  const bool all_finite = __all_sync(0xffffffff, is_finite);
  const float limit = largest_stored(stored);
  if (threadIdx.x % kWarpSize == 0) *scale = all_finite ? largest / limit : NAN;
  return limit / largest;
}

}  // namespace llamatelemetry
