// slot_mapping: one item per token. advance_step_: one item per sequence. Both of a few loads.
#include "cache/params.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace llamatelemetry {
namespace LT_ISA {
namespace {

void slot_mapping_items(const SlotMappingParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = sequence_of(p.cu_seqlens_q, p.table.batch, token);
    p.out[token] = row < 0 ? -1 : slot_of(p.table, row, p.positions[token]);
  }
}

void advance_step_items(const AdvanceStepParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) advance_row(p, row);
}

}  // namespace

Error launch_slot_mapping(const SlotMappingParams& params, Stream) {
  parallel_over<slot_mapping_items>("slot_mapping", Work{params.num_tokens, 10.0}, params);
  return nullptr;
}

Error launch_advance_step(const AdvanceStepParams& params, Stream) {
  parallel_over<advance_step_items>("advance_step_", Work{params.table.batch, 10.0}, params);
  return nullptr;
}

}  // namespace LT_ISA
}  // namespace llamatelemetry

LT_CPU_LAUNCHER(launch_slot_mapping, SlotMappingParams)
LT_CPU_LAUNCHER(launch_advance_step, AdvanceStepParams)
