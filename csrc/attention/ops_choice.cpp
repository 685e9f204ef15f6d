// The choice, asked without a tensor: the C interface that llamatelemetry/ops/backends.py calls.
#include <string>

#include "attention/ops_checks.h"

namespace llamatelemetry {
namespace {

// A GPU of a compute capability that this build holds code for, whatever runs here.
constexpr AttentionDescriptor gpu_of(int capability) {
  AttentionDescriptor d{};
  d.on_cuda = true;
  d.has_sm90_code = true;
  d.capability = d.code_capability = capability;
  d.num_sms = 1;  // says nothing of what serves a call
  constexpr int kKiB = 1024;
  d.max_shared_bytes = (capability < 80                        ? 64
                        : capability == 80 || capability == 87 ? 163
                        : capability < 90 || capability >= 120 ? 99
                                                               : 227) *
                       kKiB;
  return d;
}

// Caches of 8 bits, which typical_call does not ask about.
constexpr bool reads_8_bits(AttentionImpl impl) {
  AttentionDescriptor d = gpu_of(90);
  d.dtype = DType::kFloat16;
  d.kv_dtype = DType::kInt8;
  d.aligned = true;
  d.page_size = 16;
  d.head_dim = 128;
  return why_not(impl, d) == nullptr;
}
static_assert(reads_8_bits(AttentionImpl::kDecode) && reads_8_bits(AttentionImpl::kSimt));
static_assert(!reads_8_bits(AttentionImpl::kDecodeSm75) && !reads_8_bits(AttentionImpl::kSm90));

// The least queries that Hopper's kernel for chunks serves itself, beside rows that decode.
constexpr int64_t least_of_chunks(int64_t batch, int64_t total_q, int64_t group, int split_keys) {
  AttentionDescriptor d = gpu_of(90);
  d.dtype = d.kv_dtype = DType::kFloat16;
  d.is_packed = d.aligned = true;
  d.page_size = 16;
  d.head_dim = 128;
  d.batch = batch;
  d.num_heads_kv = 8;
  d.num_heads_q = 8 * group;
  d.seqlen_q = 512;
  d.seqlen_k = 4096;
  d.total_q = total_q;
  d.split_keys = split_keys;
  return min_queries_of(best_impl(d), d);
}
static_assert(least_of_chunks(9, 520, 4, 0) == 5 && least_of_chunks(9, 520, 32, 0) == 2);
static_assert(least_of_chunks(9, 520, 4, 512) == kMinPrefillQueries);
static_assert(least_of_chunks(1, 512, 4, 512) == 0 && least_of_chunks(2, 1024, 4, 0) == 0);

// Aligned tensors on this library's current device, or on a GPU of capability where that is not 0;
// everything else as a typical call has it.
AttentionDescriptor typical_call(int capability, DType dtype, int64_t head_dim, int64_t seqlen_q,
                                 int64_t seqlen_k, int64_t page_size) {
  AttentionDescriptor d = capability == 0 ? this_machine() : gpu_of(capability);
  d.dtype = d.kv_dtype = dtype;
  d.is_packed = page_size > 0;
  d.aligned = true;
  d.page_size = page_size;
  d.head_dim = head_dim;
  d.batch = d.num_heads_q = d.num_heads_kv = 1;
  d.seqlen_q = d.total_q = seqlen_q;
  d.seqlen_k = d.total_k = seqlen_k;
  return d;
}

}  // namespace
}  // namespace llamatelemetry

// Why a backend cannot serve a call, or nullptr. capability 0: this machine. page_size 0: dense
// keys. dtype: a DType.
LT_EXPORT const char* lt_attention_why_not(const char* backend, int capability, int dtype,
                                           int64_t head_dim, int64_t seqlen_q, int64_t seqlen_k,
                                           int64_t page_size) {
  using namespace llamatelemetry;
  const AttentionDescriptor d =
      typical_call(capability, static_cast<DType>(dtype), head_dim, seqlen_q, seqlen_k, page_size);
  for (const NamedImpl& named : kNamedImpls) {
    if (std::string(named.name) == backend) return why_not(named.impl, d);
  }
  return "no such implementation";
}

// What is chosen for such a call: "<backend>, <tiles>[, <n> splits]", or "none". The text stands
// until the thread's next call.
LT_EXPORT const char* lt_attention_choice(int capability, int dtype, int64_t head_dim,
                                          int64_t seqlen_q, int64_t seqlen_k, int64_t page_size) {
  using namespace llamatelemetry;
  const AttentionDescriptor d =
      typical_call(capability, static_cast<DType>(dtype), head_dim, seqlen_q, seqlen_k, page_size);
  const AttentionPlan plan = plan_of(best_impl(d), d);
  static thread_local std::string text;
  text = impl_name(plan.impl);
  if (plan.impl != AttentionImpl::kNone) text += std::string(", ") + tile_class_name(plan.tile);
  if (plan.num_splits > 1) text += ", " + std::to_string(plan.num_splits) + " splits";
  return text.c_str();
}
