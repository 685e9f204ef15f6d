// How CPU launchers run their work: now, on torch's thread pool, or into a recording that replays a
// whole decode step without Python and without the dispatcher, in one parallel region. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace llamatelemetry {

// Processes items [begin, end) of one launch: any run of them, often a single one where items are
// long. Which thread gets which must not matter. params points at a copy of the launcher's Params.
using Body = void (*)(const void* params, int64_t begin, int64_t end);

struct Work {
  int64_t num_items;
  // Rough time of one item on one core. Launchers write a constant for the item plus ns a value;
  // the order of magnitude is what counts: it says how many items are worth a second core (8 us of
  // work, kForkJoinNs) and from where on items are taken one by one (kLongItemNs).
  double item_ns;
};

void parallel_launch(const char* name, Body body, const void* params, size_t params_bytes,
                     Work work);

// Runs kBody over the items of work. Params must be plain data: a recording copies its bytes.
template <auto kBody, typename Params>
void parallel_over(const char* name, Work work, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>, "a recording copies Params as bytes");
  const Body body = [](const void* p, int64_t begin, int64_t end) {
    kBody(*static_cast<const Params*>(p), begin, end);
  };
  parallel_launch(name, body, &params, sizeof(Params), work);
}

// Threads that a launch made now can use.
int num_threads();

bool recording_in_progress();

// Hands an object to the recording in progress, which destroys it when it is freed itself.
void recording_keeps(void* object, void (*destroy)(void*));

}  // namespace llamatelemetry
