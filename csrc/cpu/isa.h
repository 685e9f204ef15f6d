// One source, several instruction sets. Every *_cpu.cpp is compiled once per level with LT_ISA set
// to that level's name and its compiler flags; the level is chosen once, when the library loads.
//
//   scalar      any machine           (x86-64-v2 on x86)
//   avx2        AVX2, FMA, F16C
//   avx512      AVX-512 F/BW/VL/DQ/VNNI
//   avx512bf16  and AVX-512 BF16: bfloat16 in csrc/attention/; the rest runs as avx512
//   amx         and AMX BF16: likewise
//
// ISA files hold no std containers and no inline functions with linkage: the linker keeps one copy
// of those, and if it is the AVX-512 one, older CPUs crash. So all of vec/ is `static inline`.
#pragma once

#include "common/backend.h"

#ifndef LT_ISA
#define LT_ISA scalar
#define LT_ISA_SCALAR
#elif defined(__AVX512BW__)
#define LT_ISA_AVX512
#else
#define LT_ISA_AVX2
#endif

#if defined(__AMXBF16__) && !defined(__AMX_BF16__)
#define __AMX_BF16__ 1  // as clang spells it before version 16
#endif

namespace llamatelemetry {

enum class Isa : int { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "avx512bf16", "amx"};

// The level in use: the fastest on this CPU, or LLAMATELEMETRY_CPU_ISA.
Isa cpu_isa();
const char* cpu_isa_name();

}  // namespace llamatelemetry

// Closes the file of a launcher that is defined in namespace llamatelemetry::LT_ISA: makes
// llamatelemetry::launcher, which calls the chosen level's. LT_CPU_LAUNCHER_BF16 is for a file that
// is compiled for avx512bf16 and amx too.
#if defined(LT_ISA_SCALAR) && defined(__x86_64__)
#define LT_DECLARE_LAUNCHER(isa, launcher, Params)     \
  namespace llamatelemetry {                           \
  namespace isa {                                      \
  Error launcher(const Params& params, Stream stream); \
  }                                                    \
  }
#define LT_DEFINE_LAUNCHER(launcher, Params, avx512bf16_call, amx_call) \
  LT_DECLARE_LAUNCHER(avx2, launcher, Params)                           \
  LT_DECLARE_LAUNCHER(avx512, launcher, Params)                         \
  namespace llamatelemetry {                                            \
  Error launcher(const Params& params, Stream stream) {                 \
    switch (cpu_isa()) {                                                \
      case Isa::kAmx: return amx_call;                                  \
      case Isa::kAvx512Bf16: return avx512bf16_call;                    \
      case Isa::kAvx512: return avx512::launcher(params, stream);       \
      case Isa::kAvx2: return avx2::launcher(params, stream);           \
      case Isa::kScalar: break;                                         \
    }                                                                   \
    return scalar::launcher(params, stream);                            \
  }                                                                     \
  }
#define LT_CPU_LAUNCHER(launcher, Params)                                \
  LT_DEFINE_LAUNCHER(launcher, Params, avx512::launcher(params, stream), \
                     avx512::launcher(params, stream))
#define LT_BF16_CALL(isa, launcher)                                \
  params.dtype == DType::kBFloat16 ? isa::launcher(params, stream) \
                                   : avx512::launcher(params, stream)
#define LT_CPU_LAUNCHER_BF16(launcher, Params)                               \
  LT_DECLARE_LAUNCHER(avx512bf16, launcher, Params)                          \
  LT_DECLARE_LAUNCHER(amx, launcher, Params)                                 \
  LT_DEFINE_LAUNCHER(launcher, Params, (LT_BF16_CALL(avx512bf16, launcher)), \
                     (LT_BF16_CALL(amx, launcher)))
#elif defined(LT_ISA_SCALAR)
#define LT_CPU_LAUNCHER(launcher, Params)                                                          \
  namespace llamatelemetry {                                                                       \
  Error launcher(const Params& params, Stream stream) { return scalar::launcher(params, stream); } \
  }
#define LT_CPU_LAUNCHER_BF16 LT_CPU_LAUNCHER
#else
#define LT_CPU_LAUNCHER(launcher, Params)
#define LT_CPU_LAUNCHER_BF16(launcher, Params)
#endif
