// The address of shared memory that the instructions of ptx/ take.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace llamatelemetry::ptx {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace llamatelemetry::ptx
