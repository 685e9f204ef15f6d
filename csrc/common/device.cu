#include "common/device.h"

#include "common/per_device.h"

namespace llamatelemetry {
namespace {

// Compiled for the same architectures as every portable kernel, so what is true of it is of them.
__global__ void probe_kernel() {}

DeviceFacts ask() {
  int device = 0;
  cudaGetDevice(&device);
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    cudaDeviceGetAttribute(&value, which, device);
    return value;
  };
  cudaFuncAttributes probe{};
  cudaFuncGetAttributes(&probe, probe_kernel);
  return {.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                        attribute(cudaDevAttrComputeCapabilityMinor),
          .code_capability = probe.ptxVersion,
          .num_sms = attribute(cudaDevAttrMultiProcessorCount),
          .max_shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

}  // namespace

const DeviceFacts& current_device() {
  static PerDevice<DeviceFacts> facts;
  return facts.of_current([](DeviceFacts& of_device) { of_device = ask(); });
}

}  // namespace llamatelemetry
