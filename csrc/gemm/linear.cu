#include "common/device.h"
#include "gemm/choice.h"
#include "gemm/linear_epilogue.cuh"
#include "gemm/linear_skinny.cuh"
#include "tile/kernel_entry.cuh"

namespace llamatelemetry {
namespace {

// By how many blocks a multiprocessor gets: few must have many loads under way each, many overlap
// their ends and starts. Measured in benchmarks/notes/gemm.md. It does not depend on m, but on
// whether x has more than 8 rows.
constexpr LinearSkinnyConfig kFew8{.token_tiles = 1, .warps = 8, .steps = 4, .min_blocks = 1};
constexpr LinearSkinnyConfig kSome8{.token_tiles = 1, .warps = 8, .steps = 2, .min_blocks = 2};
constexpr LinearSkinnyConfig kMany8{.token_tiles = 1, .warps = 4, .steps = 4, .min_blocks = 3};
constexpr LinearSkinnyConfig kFew16{.token_tiles = 2, .warps = 8, .steps = 2, .min_blocks = 2};
constexpr LinearSkinnyConfig kMany16{.token_tiles = 2, .warps = 4, .steps = 4, .min_blocks = 3};

template <typename T, LinearSkinnyConfig kConfig>
void start(const LinearParams& p, int64_t blocks, Stream stream) {
  using Kernel = LinearSkinny<T, kConfig>;
  launch_overlapped(kernel_entry<Kernel>, dim3(static_cast<unsigned>(blocks)), Kernel::kNumThreads,
                    stream, p);
}

template <typename T>
void start(const LinearParams& p, Stream stream) {
  const int64_t blocks = linear_blocks(p.n);
  const int num_sms = current_device().num_sms;
  const bool few = blocks <= 2 * num_sms, many = blocks > 4 * num_sms;
  if (p.m > 8)
    return few ? start<T, kFew16>(p, blocks, stream) : start<T, kMany16>(p, blocks, stream);
  if (few) return start<T, kFew8>(p, blocks, stream);
  return many ? start<T, kMany8>(p, blocks, stream) : start<T, kSome8>(p, blocks, stream);
}

template <typename V>
void start_epilogue(const LinearEpilogueParams& p, Stream stream) {
  constexpr int kNumThreads = 128;
  constexpr int64_t kMaxGridY = 65535, kOfBlock = kNumThreads * V::kElements;
  const int64_t blocks = (p.out_n + kOfBlock - 1) / kOfBlock;
  const dim3 grid(static_cast<unsigned>(p.m),
                  static_cast<unsigned>(blocks < kMaxGridY ? blocks : kMaxGridY));
  launch_overlapped(linear_epilogue_kernel<V, kNumThreads>, grid, kNumThreads, stream, p);
}

}  // namespace

Error launch_linear(const LinearParams& p, Stream stream) {
  if (p.dtype == DType::kFloat16) {
    start<Half>(p, stream);
  } else {
    start<BFloat16>(p, stream);  // choose_linear leaves float32 to torch's matmul
  }
  return last_launch_error();
}

Error launch_linear_epilogue(const LinearEpilogueParams& p, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const LinearEpilogue& e = p.epilogue;
    if (fits_wide_vectors<T>({p.y, p.out, e.residual}, p.out_n, e.residual_row_stride)) {
      start_epilogue<WideVector<T>>(p, stream);
    } else {
      start_epilogue<Vector<T, 1>>(p, stream);
    }
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
