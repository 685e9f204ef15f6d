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

// 8 key heads of 128 columns in pages of 16, whose tables hold 4096 keys.
constexpr AttentionDescriptor paged_call(int capability, int64_t batch, int64_t seqlen_q,
                                         int64_t total_q) {
  AttentionDescriptor d = gpu_of(capability);
  d.dtype = d.kv_dtype = DType::kFloat16;
  d.is_packed = d.aligned = true;
  d.page_size = 16;
  d.head_dim = 128;
  d.batch = batch;
  d.num_heads_kv = 8;
  d.num_heads_q = 32;
  d.seqlen_q = seqlen_q;
  d.seqlen_k = 4096;
  d.total_q = total_q;
  return d;
}

// The least queries that Hopper's kernel for chunks serves itself, beside rows that decode.
constexpr int64_t least_of_chunks(int64_t batch, int64_t total_q, int64_t keys, int64_t group = 4) {
  AttentionDescriptor d = paged_call(90, batch, 512, total_q);
  d.num_heads_q = 8 * group;
  d.seqlen_k = keys;
  return min_queries_of(best_impl(d), d);
}
static_assert(least_of_chunks(9, 520, 4096) == 5 && least_of_chunks(9, 520, 4096, 32) == 2);
// Chunks alone, whatever their lengths; one sequence, or all have fewer queries than was said.
static_assert(least_of_chunks(2, 1024, 16384) == 0 && least_of_chunks(2, 517, 16384) == 0);
static_assert(least_of_chunks(5, 512, 16384) == 0 && least_of_chunks(3, 900, 16383) == 0);
// Eight rows of 512 keys are worth it, and one of 16384, even where more sequences may be empty.
static_assert(least_of_chunks(9, 520, 512) == 5 && least_of_chunks(9, 520, 511) == 0);
static_assert(least_of_chunks(3, 514, 2048) == 5 && least_of_chunks(3, 514, 2047) == 0);
static_assert(least_of_chunks(2, 516, 16384) == 5 && least_of_chunks(3, 900, 16384) == 5);
static_assert(least_of_chunks(2, 513, 16384) == 5 && least_of_chunks(2, 513, 16383) == 0);
static_assert(least_of_chunks(9, 513, 16384) == 5 && least_of_chunks(9, 513, 16383) == 0);

// With keys cut at multiples of 256: parts of a sequence of few queries, by default or by name.
constexpr int parts_of_few(AttentionDescriptor d, AttentionImpl named = AttentionImpl::kNone) {
  d.split_keys = 256;
  const AttentionImpl impl = named == AttentionImpl::kNone ? best_impl(d) : named;
  d.min_queries = min_queries_of(impl, d);
  if (d.min_queries == 0) return plan_of(impl, d).num_splits;
  if (d.min_queries != kMinPrefillQueries || plan_of(impl, d).num_splits != 1) return 0;
  d.seqlen_q = d.max_queries = d.min_queries - 1;
  d.min_queries = 0;
  return plan_of(impl_of_few(impl), d).num_splits;
}
// The same beside chunks, and whatever max_seqlen_q allows for.
constexpr bool cuts_few_anywhere(AttentionDescriptor d) {
  for (const int64_t seqlen_q : {1, 15, 16, 300}) {
    for (const int64_t batch : {1, 2, 9}) {
      d.seqlen_q = seqlen_q;
      d.total_q = seqlen_q + (d.batch = batch) - 1;
      if (parts_of_few(d) != 16) return false;
    }
  }
  return true;
}
constexpr bool cuts_few_anywhere(int capability, int64_t page_size, DType stored) {
  AttentionDescriptor d = paged_call(capability, 1, 1, 1);
  d.page_size = page_size;
  d.kv_dtype = stored;
  return cuts_few_anywhere(d);
}
static_assert(cuts_few_anywhere(75, 16, DType::kFloat16));
static_assert(cuts_few_anywhere(80, 16, DType::kFloat16));
static_assert(cuts_few_anywhere(90, 1, DType::kFloat16));
static_assert(cuts_few_anywhere(90, 16, DType::kFloat16));
static_assert(cuts_few_anywhere(90, 48, DType::kInt8));
static_assert(cuts_few_anywhere(100, 16, DType::kFloat16));
static_assert(parts_of_few(paged_call(90, 2, 16, 17), AttentionImpl::kDecode) == 16);
static_assert(parts_of_few(paged_call(90, 2, 16, 17), AttentionImpl::kDecodeSm75) == 16);

// What chunks' keys are cut at is no more than kMaxSplitKeys: a part has room for what it leaves.
constexpr int parts_of_chunks(int64_t keys) {
  AttentionDescriptor d = paged_call(90, 1, 16, 16);
  d.num_heads_q = d.num_heads_kv = 1;
  d.kv_dtype = DType::kInt8;
  d.split_keys = 256;
  d.seqlen_k = keys;
  return plan_of(best_impl(d), d).num_splits;
}
static_assert(parts_of_chunks(kMaxSplitKeys) == 1 && parts_of_chunks(kMaxSplitKeys + 64) == 2);

// Drafts of 16 queries on a Hopper GPU of 132 multiprocessors: tiles of 64 rows for 53 key heads
// and more, or for 66 where mma.sync multiplies them.
constexpr bool verifies_wide(int64_t key_heads, bool has_score_terms = false) {
  AttentionDescriptor d = paged_call(90, key_heads, 16, 16 * key_heads);
  d.num_sms = 132;
  d.num_heads_kv = 1;
  d.num_heads_q = 4;
  d.has_score_terms = has_score_terms;
  const AttentionPlan plan = plan_of(best_impl(d), d);
  return plan.impl == AttentionImpl::kDecode && plan.is_wide &&
         plan.by_warpgroups != has_score_terms;
}
static_assert(verifies_wide(53) && !verifies_wide(52));
static_assert(verifies_wide(66, true) && !verifies_wide(65, true));

// The same of few sequences of 8 key heads: blocks of a cluster for each; 0: none has one.
constexpr int cluster_of_drafts(int64_t batch, int64_t queries, int64_t keys = 4096) {
  AttentionDescriptor d = paged_call(90, batch, queries, queries * batch);
  d.num_sms = 132;
  d.seqlen_k = keys;
  const AttentionPlan plan = plan_of(best_impl(d), d);
  const bool is_wide = plan.impl == AttentionImpl::kDecode && plan.is_wide;
  return is_wide && plan.by_warpgroups ? plan.cluster_blocks : 0;
}
static_assert(cluster_of_drafts(1, 16) == 16 && cluster_of_drafts(1, 5, 1 << 20) == 16);
static_assert(cluster_of_drafts(2, 5) == 8 && cluster_of_drafts(3, 12) == 4);
static_assert(cluster_of_drafts(4, 16) == 4 && cluster_of_drafts(5, 16) == 0);
// One alone with keys would be read faster by tiles of 16 rows, and one query needs no other.
static_assert(cluster_of_drafts(3, 8) == 0 && cluster_of_drafts(1, 17) == 0);
static_assert(cluster_of_drafts(1, 4) == 0);

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
