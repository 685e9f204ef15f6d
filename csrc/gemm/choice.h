// Which way linear and quant_linear go: pure functions of the call and the machine.
#pragma once

#include <cstdint>

#include "common/backend.h"
#include "common/dtype.h"
#include "format/format.h"
#include "gemm/stream_plan.h"

namespace llamatelemetry {

enum class LinearImpl : int8_t {
  kOwn,     // launch_linear: on CUDA few rows on tensor cores, at the speed of reading the weights
  kMatmul,  // torch's matmul, then launch_linear_epilogue
};

struct LinearDescriptor {
  int64_t m;  // rows of x
  int64_t n;  // rows of the weight
  int64_t k;
  DType dtype;
  bool aligned;  // CUDA: rows of x and of the weight lie at multiples of 16 bytes
  bool on_cuda;
  bool recording;       // CPU: torch's matmul would not be in the recording
  int code_capability;  // of the code that runs on the GPU: 80 for 8.0
  int num_sms;
};

// Blocks of the CUDA kernel, which has 16 rows of the weight in each.
static inline constexpr int64_t linear_blocks(int64_t n) { return (n + 15) / 16; }

constexpr int kMaxCpuLinearRows = 16;  // from here on torch's blocked matmul is ahead

static inline constexpr LinearImpl choose_linear(const LinearDescriptor& d) {
  if (!d.on_cuda) {
    return d.recording || d.m <= kMaxCpuLinearRows ? LinearImpl::kOwn : LinearImpl::kMatmul;
  }
  if (d.code_capability < 80 || d.dtype == DType::kFloat32 || !d.aligned || d.k == 0) {
    return LinearImpl::kMatmul;
  }
  // Past 8 rows every block reads as much of x as of the weight: of many blocks torch's are ahead.
  const int64_t max_rows = linear_blocks(d.n) <= int64_t{4} * d.num_sms ? 16 : 8;
  return d.m <= max_rows ? LinearImpl::kOwn : LinearImpl::kMatmul;
}

enum class QuantLinearImpl : int8_t {
  kFused,   // one kernel decodes the weights in registers: launch_quant_linear
  kStream,  // CUDA: likewise for up to 16 rows, as the operand of tensor cores
  kSkinny,  // CUDA: likewise for any number of rows, through shared memory
  kWgmma,   // Hopper: likewise for more rows, rounded to the dtype of x; no FormatSet::kLowBit
  kDense,   // CUDA: launch_dense_weights expands them to the dtype of x, torch's matmul reads that
};

struct QuantLinearDescriptor {
  int64_t m;  // rows of x
  int64_t n;  // rows of the weight
  int64_t k;
  CodeFamily codes;
  ScaleRule scale_rule;
  int group_shift;  // of ScaleRule::kGroup: GroupScales::shift
  DType dtype;      // of x
  bool aligned;     // rows of x lie at multiples of 16 bytes
  bool exact;       // weights must not be rounded to the dtype of x
  bool on_cuda;
  int capability;       // of the GPU: 90 for 9.0
  int code_capability;  // of the code that runs on it
  bool has_sm90_code;
  int num_sms;
  int max_shared_bytes;  // of a block
};

// The rows of x that the fused kernel of CUDA serves with one decoding of a weight, in registers.
constexpr int kMaxFusedRows = 8;
// Hopper: from here on wgmma is ahead of the skinny kernel, which decodes bytes more slowly than
// nibbles and has as many blocks as the weight has tiles. Up to 16 rows that was measured of the
// wgmma kernel of before, which had blocks of 16 rows of x, but not for groups.
static inline constexpr int min_wgmma_rows(CodeFamily codes, ScaleRule rule, int64_t n,
                                           int num_sms) {
  if (rule == ScaleRule::kGroup) return 17;
  const bool many_tiles = n > int64_t{2} * kTileRows * num_sms;
  return codes == CodeFamily::kS8 || (many_tiles && rule != ScaleRule::kSubBlock32) ? 9 : 17;
}
// Instead of dense weights and torch's matmul: at 256 rows of S4, U4, S8 and E4M3 wgmma takes 3 to
// 34 % less time in O, gate+up and down of Llama-3-8B, in QKV 4 to 9 % more; scales in the blocks
// and NF4 are not measured there (benchmarks/notes/gemm.md).
constexpr int kMaxWgmmaRows = 256;
// Elsewhere, up to here the skinny kernel, which reads the weights once for 16 rows, is faster than
// writing dense ones, which decoding sub-blocks makes slower, and reading them.
static inline constexpr int max_skinny_rows(ScaleRule rule) {
  return has_one_scale(rule) ? 32 : 64;
}

// The CPU library has the fused kernel alone: it keeps panels of up to 16 rows in registers,
// multiplies in int8 and never writes the weights out.
constexpr bool kHasDenseWeights = kOnCuda;

constexpr int64_t kMaxGridY = 65535;

static inline constexpr bool serves_skinny(const QuantLinearDescriptor& d) {
  constexpr int64_t kRowsOfBlock = 16;
  return d.on_cuda && d.code_capability >= 80 && d.dtype != DType::kFloat32 && d.aligned &&
         d.m <= kMaxGridY * kRowsOfBlock;
}

static inline constexpr bool serves_wgmma(const QuantLinearDescriptor& d) {
  return serves_skinny(d) && d.capability == 90 && d.has_sm90_code && !d.exact &&
         !is_low_bit(d.codes);
}

// The stream kernel wherever it can run, up to so many rows: of chunks of 256 weights, where there
// are at most two tiles a multiprocessor, the skinny kernel, with 16 warps a tile, is ahead of it.
static inline constexpr int max_stream_rows(const QuantLinearDescriptor& d) {
  const bool few_tiles = d.n <= int64_t{2} * kTileRows * d.num_sms;
  if (!few_tiles || stream_chunk(d.scale_rule) != 256) return kMaxStreamRows;
  return d.codes == CodeFamily::kU6 ? 1 : 8;
}

static inline constexpr bool serves_stream(const QuantLinearDescriptor& d) {
  const int64_t max_n = kMaxGridY * kTileRows;  // if a block has one tile
  // FP4's values are a product with float32's twelfth, which may differ from them by a last bit.
  // Of bytes whose groups are small the kernel for them all has no instance: they are rare.
  constexpr int kShiftOf128 = 2;
  const bool small_groups =
      d.scale_rule == ScaleRule::kGroup && is_byte(d.codes) && d.group_shift < kShiftOf128;
  const bool has_clusters =
      has_stream_clusters(d.capability, d.code_capability, d.max_shared_bytes);
  const bool is_rounded = d.exact && has_float_table(d.codes);
  return serves_skinny(d) && serves_stream_format(d.codes, d.scale_rule) && !small_groups &&
         !is_rounded && d.n <= max_n && d.m <= kMaxStreamRows &&
         fits_stream(d.m, d.k, d.codes, d.scale_rule, has_clusters, d.max_shared_bytes);
}

static inline constexpr QuantLinearImpl choose_quant_linear(const QuantLinearDescriptor& d) {
  if (!d.on_cuda || d.n == 0 || d.k == 0) return QuantLinearImpl::kFused;
  if (serves_stream(d) && d.m <= max_stream_rows(d)) return QuantLinearImpl::kStream;
  if (serves_wgmma(d) && d.m <= kMaxWgmmaRows &&
      d.m >= min_wgmma_rows(d.codes, d.scale_rule, d.n, d.num_sms)) {
    return QuantLinearImpl::kWgmma;
  }
  // The skinny kernel scales sums of codes, so that weights are exact; but those of float tables.
  const bool takes_any_rows = d.exact && !has_float_table(d.codes);
  const bool takes_rows = takes_any_rows || (!d.exact && d.m <= max_skinny_rows(d.scale_rule));
  if (serves_skinny(d) && takes_rows) return QuantLinearImpl::kSkinny;
  return d.exact || d.m <= kMaxFusedRows ? QuantLinearImpl::kFused : QuantLinearImpl::kDense;
}

// Whether launch_quant_linear applies an activation itself: otherwise another launch follows it.
// Gated: n / 2 must be whole tiles, so that a block has as many tiles of gates as of what they
// multiply.
static inline constexpr bool applies_activation(QuantLinearImpl impl, int64_t n, bool gated) {
  return impl == QuantLinearImpl::kStream && (!gated || n % (2 * kTileRows) == 0);
}

}  // namespace llamatelemetry
