// What launchers ask of the current GPU: queried once per device, then read from memory.
#pragma once

namespace llamatelemetry {

struct DeviceFacts {
  int capability;       // 90 for 9.0
  int code_capability;  // of the code that runs on it: 80 if it was built for 8.0 and its PTX
  int num_sms;
  int max_shared_bytes;  // of one block, when it asks for more than the default
};
const DeviceFacts& current_device();

}  // namespace llamatelemetry
