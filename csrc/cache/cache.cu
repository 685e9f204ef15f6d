#include "cache/cache.cuh"

#include <algorithm>

#include "common/int_menu.h"

namespace llamatelemetry {
namespace {

using CopyBytes = IntMenu<1, 2, 4, 8, 16>;
constexpr int kNumThreads = 128;

unsigned num_blocks_for(int64_t num_rows) {
  return static_cast<unsigned>(std::min(num_rows, kMaxBlocks));
}

}  // namespace

Error launch_append_kv(const AppendKvParams& p, Stream stream) {
  CopyBytes::dispatch(p.copy_bytes, [&](auto bytes) {
    append_kv_kernel<bytes(), kNumThreads>
        <<<num_blocks_for(p.num_tokens), kNumThreads, 0, stream>>>(p);
  });
  return last_launch_error();
}

Error launch_copy_blocks(const MoveBlocksParams& p, Stream stream) {
  CopyBytes::dispatch(p.copy_bytes, [&](auto bytes) {
    copy_blocks_kernel<bytes(), kNumThreads>
        <<<num_blocks_for(p.num_pairs * p.page_size), kNumThreads, 0, stream>>>(p);
  });
  return last_launch_error();
}

}  // namespace llamatelemetry
