#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace llamatelemetry {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports("f16c") is gcc's alone.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif
#if defined(__x86_64__) && defined(__linux__)
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBf16AndTile = 1u << 22 | 1u << 24;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBf16AndTile) == kBf16AndTile;
}
// Asks the kernel for tile registers in this process; one that knows no AMX refuses.
bool may_use_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
[[maybe_unused]] bool has_amx() { return false; }
bool may_use_amx() { return false; }
#endif

// The highest level that the CPU has.
Isa best_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool bf16 = avx2 && avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && has_amx()) return Isa::kAmx;
  if (bf16) return Isa::kAvx512Bf16;
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kScalar;
}

// Intel's dot product of pairs takes as long as three FMAs or four, AMD's as one
// (benchmarks/notes/attention.md).
bool has_slow_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// LLAMATELEMETRY_CPU_ISA can only lower the level; llamatelemetry/_native/library.py refuses a name
// that is none of ours or above this CPU before the library loads.
Isa choose_isa() {
  const Isa best = best_isa();
  const char* forced = std::getenv("LLAMATELEMETRY_CPU_ISA");
  for (int level = 0; forced != nullptr && level <= static_cast<int>(best); ++level) {
    const auto isa = static_cast<Isa>(level);
    if (std::strcmp(forced, kIsaNames[level]) == 0 && isa != Isa::kAmx) return isa;
  }
  if (best == Isa::kAmx && may_use_amx()) return best;
  if (best < Isa::kAvx512Bf16) return best;
  return has_slow_bf16() ? Isa::kAvx512 : Isa::kAvx512Bf16;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* cpu_isa_name() { return kIsaNames[static_cast<int>(cpu_isa())]; }

}  // namespace llamatelemetry

// For `llamatelemetry doctor` and the forced-level tests.
extern "C" __attribute__((visibility("default"))) const char* lt_cpu_isa() {
  return llamatelemetry::cpu_isa_name();
}
