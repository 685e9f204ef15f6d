#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "binding/stable.h"
#include "cpu/recording.h"

namespace llamatelemetry {
namespace {

// Waking torch's pool and joining it again costs about this much; a chunk has to be worth it.
constexpr double kForkJoinNs = 8000.0;
// Items from here on are taken one by one, which costs about 10 ns each
// (benchmarks/notes/attention.md).
constexpr double kLongItemNs = 2000.0;

struct Call {
  Body body;
  const void* params;
};

void run_call(int64_t begin, int64_t end, void* context) {
  const auto* call = static_cast<const Call*>(context);
  call->body(call->params, begin, end);
}

// What a thread has yet to start of its share. It takes the first item, others the last: cores
// differ in speed, and neighbours take some of their time.
class alignas(64) Share {
 public:
  void set(int64_t begin, int64_t end) { items_ = pack(begin, end); }
  // An item, or -1 where none is left.
  int64_t take(bool first) {
    uint64_t items = items_.load(std::memory_order_relaxed);
    for (;;) {
      const auto begin = static_cast<int64_t>(items >> 32);
      const auto end = static_cast<int64_t>(items & UINT32_MAX);
      if (begin == end) return -1;
      const uint64_t left = first ? pack(begin + 1, end) : pack(begin, end - 1);
      if (items_.compare_exchange_weak(items, left, std::memory_order_relaxed)) {
        return first ? begin : end - 1;
      }
    }
  }

 private:
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }

  std::atomic<uint64_t> items_;
};

struct SharedCall {
  Call call;
  std::vector<Share> shares;  // one a thread
};

// Shares [begin, end), then what is left of the others.
void run_shares(int64_t begin, int64_t end, void* context) {
  auto& [call, shares] = *static_cast<SharedCall*>(context);
  const auto num_shares = static_cast<int64_t>(shares.size());
  for (int64_t i = begin; i < begin + num_shares; ++i) {
    Share& share = shares[i % num_shares];
    for (int64_t item; (item = share.take(i < end)) >= 0;) {
      call.body(call.params, item, item + 1);
    }
  }
}

}  // namespace

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_launch(const char* name, Body body, const void* params, size_t params_bytes,
                     Work work) {
  if (work.num_items <= 0) return;
  if (Recording* recording = recording_of_this_thread()) {
    recording->append(name, body, params, params_bytes, work);
  }
  const auto grain = static_cast<int64_t>(kForkJoinNs / std::max(work.item_ns, 1e-3)) + 1;
  if (work.num_items <= grain) {
    body(params, 0, work.num_items);
    return;
  }
  Call call{body, params};
  const int64_t num_shares = std::min<int64_t>(num_threads(), (work.num_items - 1) / grain + 1);
  if (work.item_ns >= kLongItemNs && num_shares > 1 && work.num_items <= UINT32_MAX) {
    SharedCall shared{call, std::vector<Share>(static_cast<size_t>(num_shares))};
    for (int64_t i = 0; i < num_shares; ++i) {
      shared.shares[i].set(work.num_items * i / num_shares, work.num_items * (i + 1) / num_shares);
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, num_shares, 1, run_shares, &shared));
    return;
  }
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, work.num_items, grain, run_call, &call));
}

}  // namespace llamatelemetry
