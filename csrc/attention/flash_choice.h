// Which implementation of flash_attn serves a call: a pure function of what the call and the
// machine are, so that the check, the launcher and `doctor` cannot disagree.
#pragma once

#include <initializer_list>

#include "common/dtype.h"

namespace llamatelemetry {

// The schema's `backend` is one of these numbers; Python asks for their names.
enum class FlashImpl : int { kAuto, kCpu, kSm75, kSm80, kSm90, kSimt };
constexpr int kNumFlashImpls = 6;

struct FlashDescriptor {
  bool on_cuda;
  int capability;       // of the GPU: 90 for 9.0
  int code_capability;  // of the code that runs on it: 80 where it was built for 8.0 and its PTX
  bool has_sm90_code;   // whether this build holds code for 9.0a
  DType dtype;
  // Whether the rows of q, k and v lie apart, each at a multiple of 16 bytes.
  bool aligned;
};

static inline constexpr const char* flash_impl_name(FlashImpl impl) {
  switch (impl) {
    case FlashImpl::kAuto: return "auto";
    case FlashImpl::kCpu: return "cpu";
    case FlashImpl::kSm75: return "sm75";
    case FlashImpl::kSm80: return "sm80";
    case FlashImpl::kSm90: return "sm90";
    case FlashImpl::kSimt: return "simt";
  }
  return "unknown";
}

// Why impl cannot serve the call, or nullptr where it can.
static inline constexpr const char* why_not(FlashImpl impl, const FlashDescriptor& d) {
  if (impl == FlashImpl::kCpu) return d.on_cuda ? "the tensors are on a GPU" : nullptr;
  if (!d.on_cuda) return "the tensors are on the CPU";
  const bool is_half = d.dtype == DType::kFloat16;
  const bool is_16_bit = is_half || d.dtype == DType::kBFloat16;
  switch (impl) {
    case FlashImpl::kSm90:
      if (d.capability / 10 != 9) return "it needs a GPU of compute capability 9.x";
      if (!d.has_sm90_code) return "this build holds no code for 9.0";
      if (!is_16_bit) return "it serves float16 and bfloat16";
      return d.aligned ? nullptr : "rows of q, k and v must lie apart, at multiples of 16 bytes";
    case FlashImpl::kSm80:
      if (d.code_capability < 80) return "it needs a GPU of compute capability 8.0 and code for it";
      return is_16_bit ? nullptr : "it serves float16 and bfloat16";
    case FlashImpl::kSm75: return is_half ? nullptr : "it serves float16";
    case FlashImpl::kSimt: return d.dtype == DType::kFloat32 ? nullptr : "it serves float32";
    default: return "no such implementation";
  }
}

// The first that serves the call; kAuto where none does: bfloat16 below compute capability 8.0.
static inline constexpr FlashImpl choose_flash(const FlashDescriptor& d) {
  for (const FlashImpl impl :
       {FlashImpl::kCpu, FlashImpl::kSm90, FlashImpl::kSm80, FlashImpl::kSm75, FlashImpl::kSimt}) {
    if (why_not(impl, d) == nullptr) return impl;
  }
  return FlashImpl::kAuto;
}

}  // namespace llamatelemetry
