// Chooses at run time among the builds of one kernel for several instruction sets.
#pragma once

#include "common/macros.h"

// Declares `name` for every instruction set; each build of a csrc/cpu/*.cpp file defines its own.
#define IK_DECLARE_PER_ISA(type, name) \
  namespace ik {                       \
  namespace generic {                  \
  extern const type name;              \
  }                                    \
  namespace avx2 {                     \
  extern const type name;              \
  }                                    \
  namespace avx512 {                   \
  extern const type name;              \
  }                                    \
  }

#if defined(__x86_64__)
#define IK_PICK_ISA(name)                              \
  (ik::cpu_isa() == ik::Isa::avx512 ? ik::avx512::name \
   : ik::cpu_isa() == ik::Isa::avx2 ? ik::avx2::name   \
                                    : ik::generic::name)
#else
#define IK_PICK_ISA(name) (ik::generic::name)
#endif

namespace ik {

enum class Isa { generic, avx2, avx512 };

// The best set this machine has; INPAINT_KERNELS_CPU_ISA=generic|avx2|avx512 lowers it.
Isa cpu_isa();

}  // namespace ik
