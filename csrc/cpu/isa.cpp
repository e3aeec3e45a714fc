// Run-time detection of the instruction set, and the library's one exported symbol.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace ik {

static Isa detect() {
  Isa best = Isa::generic;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      best = Isa::avx512;
    }
  }
#endif
  const char* wanted = std::getenv("INPAINT_KERNELS_CPU_ISA");
  if (wanted == nullptr) return best;
  if (std::strcmp(wanted, "generic") == 0) return Isa::generic;
  if (std::strcmp(wanted, "avx2") == 0 && best != Isa::generic) return Isa::avx2;
  return best;
}

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace ik

extern "C" __attribute__((visibility("default"))) const char* inpaint_kernels_cpu_isa() {
  switch (ik::cpu_isa()) {
    case ik::Isa::avx512:
      return "avx512";
    case ik::Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}
