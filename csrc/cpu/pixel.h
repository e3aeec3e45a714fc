// Interface between the pixel-loss kernels (pixel.cpp, one build per instruction set) and the registrations
// of masked_l1 and hole_valid.
#pragma once

#include <cstdint>

#include "common/pixel.h"
#include "common/pixel_shape.h"
#include "cpu/isa.h"

namespace ik {

enum class Dtype : int;

struct PixelCall {
  PixelShape shape;
  Penalty penalty = Penalty::l1;
  double param = 0;
  int regions = 1;            // 2: (hole, valid)
  bool mask_is_hole = false;  // regions == 2: the mask holds the first region's weight
  bool wide = false;          // accumulate in double
  // pred holds `copies` predictions of one target, in the order of torch.cat; shape.samples counts them all.
  int64_t copies = 1;
  bool mask_per_copy = false;  // the mask's batch is pred's, not target's

  const void* pred = nullptr;    // [N, segments, length]
  const void* target = nullptr;  // [N / copies, segments, length]
  const void* mask = nullptr;
  Dtype pred_dtype{}, target_dtype{}, mask_dtype{};
  Dtype grad_pred_dtype{}, grad_target_dtype{};
  uint8_t* signs = nullptr;  // [N * segments, groups, 2]; written forward, read backward (l1)

  // Forward.
  double* partials = nullptr;    // [units, 4]: sum and weight of the first, then of the second region
  void* map = nullptr;           // [N, segments, length] float or double: reduction="none"
  uint8_t* binary = nullptr;     // set to 0 if a weight is neither 0 nor 1
  uint8_t* mask_bits = nullptr;  // [N, groups]: the mask of the first segment, a bit an element

  // Backward.
  const double* coefficient = nullptr;  // [N, regions]: grad * scale
  const void* grad_map = nullptr;       // [N, segments, length] float or double: reduction="none"
  void* grad_pred = nullptr;
  void* grad_target = nullptr;
  bool stream = false;  // write the gradients around the cache

  // A unit is up to 4 segments of one sample over one chunk of elements: a mask shared by the channels is
  // then read from memory once. Fixed by the shape alone, so that results do not depend on the number of
  // threads.
  static constexpr int64_t chunk = 8192;
  static constexpr int64_t unit_segments = 4;
  int64_t chunks() const { return (shape.length + chunk - 1) / chunk; }
  int64_t segment_groups() const { return (shape.segments + unit_segments - 1) / unit_segments; }
  int64_t units() const { return shape.samples / copies * segment_groups() * chunks(); }
};

using PixelKernel = void (*)(const PixelCall& call, int64_t unit_begin, int64_t unit_end);
struct PixelKernels {
  PixelKernel forward;
  PixelKernel backward;
};

}  // namespace ik

IK_DECLARE_PER_ISA(PixelKernels, pixel_kernels)
namespace ik {
namespace generic {
extern const PixelKernels pixel_kernels_wide;
}
}  // namespace ik
