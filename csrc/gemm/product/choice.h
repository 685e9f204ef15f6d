// Which kernel a product takes and how its operands must lie: pure functions of the call and the
// machine.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "gemm/product/params.h"

namespace llamatelemetry {

constexpr int64_t kLoadBytes = 16;  // what the kernels of CUDA load at a time

// How an operand lies in memory, for kernels that load kLoadBytes at a time.
enum class OperandLayout : int8_t {
  kAlongK,     // k is contiguous
  kAlongRows,  // rows are: the operand came transposed
  kUnaligned,  // launch_pack_rows first
};

static inline OperandLayout layout_of(const Operand& x, int64_t batch, int64_t k,
                                      int64_t element_bytes) {
  const auto fits = [&](int64_t stride) { return stride * element_bytes % kLoadBytes == 0; };
  const bool aligned =
      reinterpret_cast<uintptr_t>(x.data) % kLoadBytes == 0 && (batch <= 1 || fits(x.batch_stride));
  if (!aligned) return OperandLayout::kUnaligned;
  const auto apart = [&](int64_t count, int64_t stride) {
    return count <= 1 || (stride > 0 && fits(stride));
  };
  if ((k <= 1 || x.k_stride == 1) && apart(x.rows, x.row_stride)) return OperandLayout::kAlongK;
  return (x.rows <= 1 || x.row_stride == 1) && apart(k, x.k_stride) ? OperandLayout::kAlongRows
                                                                    : OperandLayout::kUnaligned;
}

struct ProductDescriptor {
  int64_t k;
  DType dtype;
  bool on_cuda;
  int capability;       // of the GPU: 90 for 9.0
  int code_capability;  // of the code that runs on it
  bool has_sm90_code;
};

// The implementations, the fastest first, by the name that an op's backend takes.
struct NamedProductImpl {
  const char* name;
  ProductImpl impl;
  const char* needs;
};
constexpr NamedProductImpl kProductImpls[] = {
    {"sm90", ProductImpl::kSm90,
     "a Hopper GPU, a build for 9.0, 16-bit or int8 matrices and k > 0"},
    {"sm80", ProductImpl::kSm80, "a GPU and code of 8.0 or newer, and 16-bit or int8 matrices"},
    {"sm75", ProductImpl::kSm75, "a GPU, and float16 or int8 matrices"},
    {"simt", ProductImpl::kSimt, "a GPU, and float32, float16 or bfloat16 matrices"},
    {"cpu", ProductImpl::kCpu, "tensors on the CPU"},
};

static inline constexpr bool serves(ProductImpl impl, const ProductDescriptor& d) {
  switch (impl) {
    case ProductImpl::kSm90:
      return d.capability == 90 && d.has_sm90_code && d.k > 0 && d.dtype != DType::kFloat32;
    case ProductImpl::kSm80:
      return d.on_cuda && d.code_capability >= 80 && d.dtype != DType::kFloat32 &&
             d.dtype != DType::kFloat8E4M3;
    case ProductImpl::kSm75:
      return d.on_cuda && (d.dtype == DType::kFloat16 || d.dtype == DType::kInt8);
    case ProductImpl::kSimt: return d.on_cuda && is_floating(d.dtype);
    case ProductImpl::kCpu: return !d.on_cuda;
  }
  return false;
}

static inline constexpr ProductImpl choose_product(const ProductDescriptor& d) {
  for (const NamedProductImpl& named : kProductImpls) {
    if (serves(named.impl, d)) return named.impl;
  }
  return d.on_cuda ? ProductImpl::kSimt : ProductImpl::kCpu;
}

// Operands of one byte have matrix instructions along k alone.
static inline constexpr bool takes_rows(DType dtype) { return dtype_bytes(dtype) > 1; }

// Scaled products of bytes for so few rows that the read of b is what they cost have kernels of
// their own: large tiles would leave most multiprocessors idle (benchmarks/notes/gemm.md).
static inline bool is_scaled_bytes(const ProductParams& p) {
  const bool scaled = p.row_scales != nullptr || p.row_blocks != nullptr;
  return scaled && dtype_bytes(p.dtype) == 1 && p.batch == 1;
}
// few_rows.cuh
constexpr int64_t kMaxFewRows = 16;
static inline bool has_few_rows(const ProductParams& p) {
  const bool served = p.impl == ProductImpl::kSm90 || p.impl == ProductImpl::kSm80;
  return served && is_scaled_bytes(p) && p.m <= kMaxFewRows && p.k % kLoadBytes == 0;
}
// some_rows.cuh, on Hopper
constexpr int64_t kMaxSomeRows = 64;  // a tile
static inline bool has_some_rows(const ProductParams& p) {
  return p.impl == ProductImpl::kSm90 && is_scaled_bytes(p) && p.m <= kMaxSomeRows;
}
// Up to here its tiles have 64 columns, so that most multiprocessors have one; of more, 128, which
// read less of a.
static inline constexpr bool has_narrow_tiles(int64_t n, int num_sms) {
  return n <= int64_t{128} * num_sms;
}

// The CPU's kernel takes any strides.
constexpr bool kPacksRows = kOnCuda;

// Tiles that run after one another read the same rows: kGroupTiles of them down, then across.
struct TilePlace {
  int64_t batch;
  int64_t row;     // tile of m
  int64_t column;  // tile of n
};
static inline constexpr TilePlace tile_place(int64_t index, int64_t row_tiles,
                                             int64_t column_tiles) {
  constexpr int64_t kGroupTiles = 16;
  const int64_t of_batch = row_tiles * column_tiles;
  const int64_t in_batch = index % of_batch;
  const int64_t first = in_batch / (kGroupTiles * column_tiles) * kGroupTiles;
  const int64_t size = row_tiles - first < kGroupTiles ? row_tiles - first : kGroupTiles;
  const int64_t in_group = in_batch - first * column_tiles;
  return {index / of_batch, first + in_group % size, in_group / size};
}

}  // namespace llamatelemetry
