// From an op to its kernel: the launcher runs on the current stream, and what it returns is raised.
#pragma once

#include <string>

#include "binding/checks.h"
#include "binding/stable.h"

namespace llamatelemetry {

template <typename Params>
void launch(const char* op, Error (*launcher)(const Params&, Stream), const Params& params,
            const Tensor& on) {
  if (const Error error = launcher(params, current_stream(on))) {
    refuse(std::string(op) + ": " + error);
  }
}

}  // namespace llamatelemetry
