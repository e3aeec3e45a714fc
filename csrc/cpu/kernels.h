// How the ops call the kernels of csrc/cpu/isa, which are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/pixel_shape.h"

namespace ik {

enum class Isa { generic, avx2, avx512 };

// The best set this machine has; INPAINT_KERNELS_CPU_ISA=generic|avx2|avx512 lowers it.
Isa cpu_isa();

// bits: a mask of zeros and ones, 8 elements a byte.
enum class Dtype : int { f32, f64, f16, bf16, boolean, bits };

static inline int64_t dtype_bytes(Dtype dtype) {
  return dtype == Dtype::f64                           ? 8
         : dtype == Dtype::f32                         ? 4
         : dtype == Dtype::f16 || dtype == Dtype::bf16 ? 2
                                                       : 1;
}

// A kernel works on a range of the units that `call` is divided into.
template <typename Call>
using Kernel = void (*)(const Call& call, int64_t unit_begin, int64_t unit_end);

template <typename Call>
struct Kernels {
  Kernel<Call> forward, backward;
};

// Rows or elements begin .. end of up to 4 segments of one sample.
struct Unit {
  int64_t sample, segment_begin, segment_end, begin, end;
  int64_t segments() const { return segment_end - segment_begin; }
};

// What every kernel over images is called with.
struct ImageCall {
  PixelShape shape;           // of pred
  bool mask_is_hole = false;  // the mask is 1 in the hole, else where pixels are known
  bool wide = false;          // compute in double

  const void* pred = nullptr;
  const void* target = nullptr;
  const void* mask = nullptr;
  Dtype pred_dtype{}, target_dtype{}, mask_dtype{};

  // Backward.
  void* grad_pred = nullptr;
  void* grad_target = nullptr;
  bool stream = false;  // write the results around the cache

  // The segments of a unit share a mask of one channel, which is then read from memory once. Units are fixed by
  // the shape alone, so that results do not depend on the number of threads.
  static constexpr int64_t unit_segments = 4;
  int64_t segment_groups() const { return (shape.segments + unit_segments - 1) / unit_segments; }
  // Unit `index` of chunks of `step` out of `extent` rows or elements.
  Unit unit_of(int64_t index, int64_t extent, int64_t step) const {
    const int64_t chunks = (extent + step - 1) / step;
    const int64_t begin = index % chunks * step;
    const int64_t segment = index / chunks % segment_groups() * unit_segments;
    const int64_t sample = index / chunks / segment_groups();
    const int64_t segment_end = segment + unit_segments;
    return {sample, segment, segment_end < shape.segments ? segment_end : shape.segments, begin,
            begin + step < extent ? begin + step : extent};
  }
};

}  // namespace ik

// Declares the kernels `name` of every instruction set, and those that compute in double.
#define IK_DECLARE_PER_ISA(type, name) \
  namespace ik::generic {              \
  extern const type name, name##_wide; \
  }                                    \
  namespace ik::avx2 {                 \
  extern const type name;              \
  }                                    \
  namespace ik::avx512 {               \
  extern const type name;              \
  }

// Defines them: of<T> is what computes in T. float64 is for checking, not for speed: one build of it is
// enough.
#if defined(IK_ISA_GENERIC)
#define IK_DEFINE_PER_ISA(type, name, of) const type name = of<float>, name##_wide = of<double>;
#else
#define IK_DEFINE_PER_ISA(type, name, of) const type name = of<float>;
#endif

#if defined(__x86_64__)
#define IK_PICK_ISA(name, wide)                                  \
  ((wide)                             ? ik::generic::name##_wide \
   : ik::cpu_isa() == ik::Isa::avx512 ? ik::avx512::name         \
   : ik::cpu_isa() == ik::Isa::avx2   ? ik::avx2::name           \
                                      : ik::generic::name)
#else
#define IK_PICK_ISA(name, wide) ((wide) ? ik::generic::name##_wide : ik::generic::name)
#endif
