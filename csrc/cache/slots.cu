#include "cache/slots.cuh"

#include <algorithm>

namespace llamatelemetry {
namespace {

constexpr int kNumThreads = 128;

unsigned num_blocks_for(int64_t num_items) {
  return static_cast<unsigned>(
      std::min((num_items + kNumThreads - 1) / kNumThreads, kMaxSlotBlocks));
}

}  // namespace

Error launch_slot_mapping(const SlotMappingParams& p, Stream stream) {
  slot_mapping_kernel<kNumThreads><<<num_blocks_for(p.num_tokens), kNumThreads, 0, stream>>>(p);
  return last_launch_error();
}

Error launch_advance_step(const AdvanceStepParams& p, Stream stream) {
  advance_step_kernel<kNumThreads><<<num_blocks_for(p.table.batch), kNumThreads, 0, stream>>>(p);
  return last_launch_error();
}

}  // namespace llamatelemetry
