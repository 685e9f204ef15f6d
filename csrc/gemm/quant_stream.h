// Of the calls that choice.h sends to tensor cores, kSkinny and kWgmma, those that the kernel of
// quant_stream.cuh takes, and its launchers, by the dtype of x.
#pragma once

#include "common/device.h"
#include "gemm/params.h"
#include "gemm/stream_plan.h"

namespace llamatelemetry {

// Codes of more than four bits, whose kernels are compiled in files of their own.
static inline constexpr bool is_wide_stream(CodeFamily codes) { return codes != CodeFamily::kU4; }

// Blocks that share k. Where shared memory is small, as on GeForce of Blackwell, there are none.
static inline bool has_stream_clusters(const DeviceFacts& device) {
  return device.capability >= 90 && device.code_capability >= 90 &&
         device.max_shared_bytes >= kMaxStreamShared;
}

// Where tiles are few the kernel with 16 warps a tile is ahead of it for more than so many rows.
static inline int max_rows_of_few_tiles(const FormatDescriptor& format) {
  if (stream_chunk(format.scale_rule) != 256) return kMaxStreamRows;
  return format.codes == CodeFamily::kU6 ? 1 : 8;
}

static inline bool serves_stream(const QuantLinearParams& p, const DeviceFacts& device) {
  const FormatDescriptor& format = kFormats[p.format];
  constexpr int64_t kMaxRows = int64_t{65535} * kTileRows;  // of a grid, if a block has one tile
  // Of bytes whose groups are small the kernel for them all has no instance: they are rare.
  constexpr int kShiftOf128 = 2;
  if (is_byte(format.codes) && format.takes_scales() && p.groups.shift < kShiftOf128) return false;
  if (!serves_stream_format(format.codes, format.scale_rule) ||
      p.k % stream_chunk(format.scale_rule) != 0 || p.n > kMaxRows || p.m > kMaxStreamRows) {
    return false;
  }
  const bool few_tiles = p.n <= int64_t{2} * kTileRows * device.num_sms;
  if (few_tiles && p.m > max_rows_of_few_tiles(format)) return false;
  // The rows of x that a block has lie in its shared memory, and at most as much beside them.
  const int64_t splits = has_stream_clusters(device) ? max_stream_splits(p.m) : 1;
  const int chunk = stream_chunk(format.scale_rule);
  const int sums = max_stream_sums(format.codes, format.scale_rule);
  const int64_t chunks = (p.k / chunk + splits - 1) / splits;
  const int64_t rows = p.m == 1 ? 1 : p.m <= 8 ? 8 : 16;  // as they are planned for
  return rows * (chunks * 2 * chunk + 4096) + 192 * sums * chunks <= device.max_shared_bytes;
}

Error launch_quant_stream_f16(const QuantLinearParams& params, Stream stream);
Error launch_quant_stream_bf16(const QuantLinearParams& params, Stream stream);
// Of codes of more than four bits.
Error launch_quant_stream_wide_f16(const QuantLinearParams& params, Stream stream);
Error launch_quant_stream_wide_bf16(const QuantLinearParams& params, Stream stream);

}  // namespace llamatelemetry
