// A tile of 16-bit rows in shared memory, in chunks of 16 bytes that are permuted within a row, so
// that the eight rows of a matrix load lie in different banks. And the fragments read from it.
#pragma once

#include <cstdint>

#include "ptx/mma.cuh"

namespace llamatelemetry {

// kColumns: a multiple of 32. The tile starts at a multiple of 128 bytes.
template <int kColumns>
struct SwizzledTile {
  static constexpr int kChunkElements = 8;
  static constexpr int kChunkBytes = 16;
  static constexpr int kChunks = kColumns / kChunkElements;
  static constexpr int kRowBytes = kChunks * kChunkBytes;
  // Chunks that trade places: 8 fill all banks; of rows that start in either half of them, 4 do.
  static constexpr int kSpan = kChunks % 8 == 0 ? 8 : 4;
  static_assert(kChunks % kSpan == 0);

  static constexpr int bytes(int rows) { return rows * kRowBytes; }

  static __device__ uint32_t offset(int row, int chunk) {
    const int swizzle = kSpan == 8 ? row % 8 : row / 2 % 4;
    return row * kRowBytes + (chunk ^ swizzle) * kChunkBytes;
  }
  // From the address of chunk 0 or 1 of a row to that `step` chunks on; step is even.
  static __device__ uint32_t advance(uint32_t address, int step) {
    return (address ^ (step % kSpan * kChunkBytes)) + step / kSpan * kSpan * kChunkBytes;
  }

  // Where lane l reads the fragments of a 16 x 16 block at (0, 0): rows as a, rows as columns of b
  // (two 8-wide tiles), and transposed, columns as columns of b (likewise).
  static __device__ uint32_t a_offset(int lane) { return offset(lane % 16, lane / 16); }
  static __device__ uint32_t b_offset(int lane) {
    return offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  static __device__ uint32_t b_trans_offset(int lane) { return a_offset(lane); }
};

// d += a * b, 16 x 8 += 16 x 16 * 16 x 8.
struct MmaSm80 {
  template <typename T>
  static __device__ void add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k16(d, a, b0, b1, d, T{});
  }
};
struct MmaSm75 {
  template <typename T>
  static __device__ void add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_m16n8k8(d, a[0], a[1], b0, d);
    ptx::mma_m16n8k8(d, a[2], a[3], b1, d);
  }
};

}  // namespace llamatelemetry
