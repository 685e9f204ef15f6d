// The only include of torch's stable headers. Everything an ops.cpp needs of torch: the tensor, the
// registration macro, the current stream, the device guard and allocation.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>

#include "common/backend.h"
#include "common/dtype.h"
#include "cpu/parallel.h"

// Registers kernels under this library's dispatch key; the two steps expand the key first.
#define LT_IMPL_EXPANDED(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define LT_IMPL(m) LT_IMPL_EXPANDED(llamatelemetry, LT_DISPATCH_KEY, m)

namespace llamatelemetry {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;

#ifdef LT_CUDA

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& x) : guard_(x.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline Stream current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

#else

// torch's accelerator guard raises where torch has no accelerator, so the CPU has none.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor&) {}
};

inline Stream current_stream(const Tensor&) { return {}; }

#endif

// Uninitialised, contiguous, on the device of like. A recording in progress keeps it alive, because
// its launches will read and write it again at every replay.
inline Tensor allocate(const Tensor& like, IntArrayRef sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
#ifndef LT_CUDA
  if (recording_in_progress()) {
    recording_keeps(new Tensor(tensor), [](void* kept) { delete static_cast<Tensor*>(kept); });
  }
#endif
  return tensor;
}

inline Tensor allocate(const Tensor& like, IntArrayRef sizes) {
  return allocate(like, sizes, like.scalar_type());
}

// A str argument of an op. Its kernel takes a StringHandle and hands it to this at once; the handle
// is gone then. Not std::string: torch's conversion to one leaks a copy at every call (still
// in 2.13).
inline std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// torch's own x · weightᵀ + bias.
inline Tensor call_torch_linear(const Tensor& x, const Tensor& weight,
                                const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace llamatelemetry
