#include "cpu/recording.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "binding/stable.h"

namespace llamatelemetry {
namespace {

// A chunk of a replay is worth a second core from here on: one cache line changes hands.
constexpr double kMinChunkNs = 500.0;
// Longer waits give the core away: a neighbour may need it to finish the chunk we wait for.
constexpr int kSpinsBeforeYield = 20000;

thread_local Recording* t_recording = nullptr;
thread_local std::string t_error;

int64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

inline void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Recording* recording_of_this_thread() { return t_recording; }

bool recording_in_progress() { return t_recording != nullptr; }

void recording_keeps(void* object, void (*destroy)(void*)) { t_recording->keep(object, destroy); }

Recording::~Recording() {
  for (const Kept& kept : kept_) kept.destroy(kept.object);
}

void Recording::append(const char* name, Body body, const void* params, size_t params_bytes,
                       Work work) {
  Launch launch{name, body, {}, work.num_items};
  launch.params.resize((params_bytes + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t));
  std::memcpy(launch.params.data(), params, params_bytes);
  const auto index = static_cast<int32_t>(launches_.size());
  launches_.push_back(std::move(launch));

  const double worthwhile = static_cast<double>(work.num_items) * work.item_ns / kMinChunkNs;
  const auto num_chunks = static_cast<int32_t>(std::clamp<double>(
      worthwhile, 1, static_cast<double>(std::min<int64_t>(work.num_items, num_threads_))));
  if (num_chunks == 1 && !tickets_.empty() && tickets_.back().num_chunks == 1) {
    ++tickets_.back().num_launches;
    return;
  }
  const auto num_before = static_cast<int64_t>(tickets_.size());
  for (int32_t chunk = 0; chunk < num_chunks; ++chunk) {
    tickets_.push_back({index, 1, chunk, num_chunks, num_before});
  }
}

void Recording::run(const Ticket& ticket) {
  for (int32_t i = 0; i < ticket.num_launches; ++i) {
    const Launch& launch = launches_[ticket.first_launch + i];
    const int64_t begin = launch.num_items * ticket.chunk / ticket.num_chunks;
    const int64_t end = launch.num_items * (ticket.chunk + 1) / ticket.num_chunks;
    launch.body(launch.params.data(), begin, end);
    if (completed_ns_) {
      std::atomic<int64_t>& completed = completed_ns_[ticket.first_launch + i];
      const int64_t now = now_ns();
      int64_t latest = completed.load();
      while (latest < now && !completed.compare_exchange_weak(latest, now)) {
      }
    }
  }
}

void Recording::take_tickets() {
  const auto num_tickets = static_cast<int64_t>(tickets_.size());
  for (;;) {
    const int64_t index = next_ticket_.fetch_add(1, std::memory_order_relaxed);
    if (index >= num_tickets) return;
    const Ticket& ticket = tickets_[index];
    int spins = 0;
    while (num_completed_.load(std::memory_order_acquire) < ticket.num_before) {
      spin_pause();
      if (++spins > kSpinsBeforeYield) sched_yield();
    }
    run(ticket);
    num_completed_.fetch_add(1, std::memory_order_release);
  }
}

void Recording::replay() {
  next_ticket_.store(0, std::memory_order_relaxed);
  num_completed_.store(0, std::memory_order_relaxed);
  const auto run = [](int64_t, int64_t, void* self) {
    static_cast<Recording*>(self)->take_tickets();
  };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, num_threads_, 1, run, this));
}

void Recording::profile(int64_t* launch_ns) {
  struct Off {
    std::unique_ptr<std::atomic<int64_t>[]>& completed_ns;
    ~Off() { completed_ns.reset(); }  // after a replay that throws too
  } const off{completed_ns_};
  completed_ns_ = std::make_unique<std::atomic<int64_t>[]>(launches_.size());
  int64_t before = now_ns();
  replay();
  for (size_t i = 0; i < launches_.size(); ++i) {
    const int64_t completed = std::max(before, completed_ns_[i].load());
    launch_ns[i] = completed - before;
    before = completed;
  }
}

}  // namespace llamatelemetry

// The C interface that llamatelemetry/inference/recording.py calls.
using llamatelemetry::Recording;

// Launches of this thread go into a new recording, and run as usual, until lt_recording_end.
LT_EXPORT Recording* lt_recording_begin() {
  if (llamatelemetry::t_recording != nullptr) return nullptr;
  return llamatelemetry::t_recording = new Recording(llamatelemetry::num_threads());
}

LT_EXPORT int64_t lt_recording_end() {
  const Recording* recording = llamatelemetry::t_recording;
  llamatelemetry::t_recording = nullptr;
  return recording == nullptr ? -1 : static_cast<int64_t>(recording->num_launches());
}

// 0, or -1 when a launch raised: lt_recording_error then says what. launch_ns is nullptr, or where
// Recording::profile writes.
LT_EXPORT int lt_recording_replay(Recording* recording, int64_t* launch_ns) {
  try {
    launch_ns == nullptr ? recording->replay() : recording->profile(launch_ns);
    return 0;
  } catch (const std::exception& error) {
    llamatelemetry::t_error = error.what();
    return -1;
  }
}

LT_EXPORT const char* lt_recording_error() { return llamatelemetry::t_error.c_str(); }

LT_EXPORT const char* lt_recording_launch_name(const Recording* recording, int64_t index) {
  return recording->launch_name(static_cast<size_t>(index));
}

LT_EXPORT void lt_recording_free(Recording* recording) { delete recording; }
