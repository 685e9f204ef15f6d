// Numbers of 8 bits, float8_e4m3 or int8, as pairs of float16, where each is exact.
#pragma once

#include <cstdint>

#include "attention/decode/config.h"
#include "common/dtype.h"
#include "ptx/convert.cuh"

namespace llamatelemetry::decode {

template <Stored kStored>
struct EightBit;

template <>
struct EightBit<Stored::kE4M3> {
  static __device__ uint32_t prepared(uint32_t bytes) { return bytes; }
  // Bytes 0 and 1, or 2 and 3, of what prepared gave.
  static __device__ uint32_t pair(uint32_t bytes, bool second) {
#if __CUDA_ARCH__ >= 890
    return second ? ptx::e4m3_to_half_high(bytes) : ptx::e4m3_to_half_low(bytes);
#else
    // Sign, exponent and mantissa lie together in both types, so a shift does; what is left is the
    // difference of the exponents' biases, 8. (NaN, which append_kv_ never writes, reads as 480.)
    const uint32_t high = __byte_perm(bytes, 0, second ? 0x3424 : 0x1404);
    const uint32_t bits = (high & 0x80008000) | (high >> 1 & 0x3fff3fff);
    const __half2 two = __hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(256.0f));
    return reinterpret_cast<const uint32_t&>(two);
#endif
  }
};

template <>
struct EightBit<Stored::kInt8> {
  static __device__ uint32_t prepared(uint32_t bytes) { return bytes ^ 0x80808080; }  // + 128
  // In the mantissa of 1024 a byte adds itself; what is subtracted leaves the number.
  static __device__ uint32_t pair(uint32_t bytes, bool second) {
    const uint32_t bits = __byte_perm(bytes, 0x64646464, second ? 0x4342 : 0x4140);
    const __half2 two =
        __hsub2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(1024.0f + 128.0f));
    return reinterpret_cast<const uint32_t&>(two);
  }
};

}  // namespace llamatelemetry::decode
