#include "common/parallel.h"

#include <algorithm>

#include "common/recording.h"
#include "common/stable.h"

namespace llamatelemetry {
namespace {

// Waking torch's pool and joining it again costs about this much; a chunk has to be worth it.
constexpr double kForkJoinNs = 8000.0;

struct Call {
  Body body;
  const void* params;
};

void run_call(int64_t begin, int64_t end, void* context) {
  const auto* call = static_cast<const Call*>(context);
  call->body(call->params, begin, end);
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
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, work.num_items, grain, run_call, &call));
}

}  // namespace llamatelemetry
