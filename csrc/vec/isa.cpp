#include "vec/isa.h"

#include <cstdlib>
#include <cstring>

namespace llamatelemetry {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};

Isa best_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kScalar;
}

// LLAMATELEMETRY_CPU_ISA can only lower the level; llamatelemetry/_library.py refuses a name that
// is none of ours or above this CPU before the library loads.
Isa choose_isa() {
  const Isa best = best_isa();
  const char* forced = std::getenv("LLAMATELEMETRY_CPU_ISA");
  for (int level = 0; forced != nullptr && level < static_cast<int>(best); ++level) {
    if (std::strcmp(forced, kNames[level]) == 0) return static_cast<Isa>(level);
  }
  return best;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* cpu_isa_name() { return kNames[static_cast<int>(cpu_isa())]; }

}  // namespace llamatelemetry

// For `llamatelemetry doctor` and the forced-level tests.
extern "C" __attribute__((visibility("default"))) const char* lt_cpu_isa() {
  return llamatelemetry::cpu_isa_name();
}
