// What is asked of each GPU once, the first 64, and read from memory from then on. CUDA alone.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>

namespace llamatelemetry {

// A value a device, zeros at first; any thread may ask.
template <typename T>
class PerDevice {
 public:
  // That of the current device, which ask(value) has filled at the first call for it.
  template <typename Ask>
  const T& of_current(Ask&& ask) {
    int device = 0;
    cudaGetDevice(&device);
    if (device >= kMaxDevices) {  // no place to keep it: asked anew each time
      struct Answer {
        T value{};
      };
      thread_local Answer answer;
      answer = Answer{};
      ask(answer.value);
      return answer.value;
    }
    std::call_once(asked_[device], [&] { ask(values_[device]); });
    return values_[device];
  }

 private:
  static constexpr int kMaxDevices = 64;
  T values_[kMaxDevices]{};
  std::once_flag asked_[kMaxDevices];
};

}  // namespace llamatelemetry
