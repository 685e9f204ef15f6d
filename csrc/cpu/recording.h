// A recording: the launches of one decode step, in order, replayed from C++. The CPU's counterpart
// of a CUDA graph: pointers and sizes are frozen, the memory behind them is read afresh.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/parallel.h"

namespace llamatelemetry {

class Recording {
 public:
  explicit Recording(int num_threads) : num_threads_(num_threads) {}
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  ~Recording();

  void append(const char* name, Body body, const void* params, size_t params_bytes, Work work);
  void keep(void* object, void (*destroy)(void*)) { kept_.push_back({object, destroy}); }
  void replay();
  // A replay that writes to launch_ns [num_launches()] how much later than all launches before it
  // each one was completed; they add up to the whole replay.
  void profile(int64_t* launch_ns);
  size_t num_launches() const { return launches_.size(); }
  const char* launch_name(size_t index) const { return launches_[index].name; }

 private:
  struct Launch {
    const char* name;
    Body body;
    std::vector<std::max_align_t> params;
    int64_t num_items;
  };
  // What one thread takes at a time: a chunk of a launch, or several small launches in a row, which
  // stay on one core that way.
  struct Ticket {
    int32_t first_launch;
    int32_t num_launches;
    int32_t chunk;
    int32_t num_chunks;
    int64_t num_before;  // tickets that must be completed first
  };
  struct Kept {
    void* object;
    void (*destroy)(void*);
  };

  // Takes tickets until none is left. Any number of threads may call it, at any time: none waits
  // for a thread that holds no ticket.
  void take_tickets();
  void run(const Ticket& ticket);

  int num_threads_;
  std::vector<Launch> launches_;
  std::vector<Kept> kept_;
  std::vector<Ticket> tickets_;
  std::unique_ptr<std::atomic<int64_t>[]> completed_ns_;  // [num_launches()] while profiling
  alignas(64) std::atomic<int64_t> next_ticket_{0};
  alignas(64) std::atomic<int64_t> num_completed_{0};
};

Recording* recording_of_this_thread();

}  // namespace llamatelemetry
