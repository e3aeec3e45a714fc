// Interface between the kernels of the pixel losses (isa/pixel.cpp) and the ops masked_l1, hole_valid and
// feature_distance.
#pragma once

#include "common/pixel.h"
#include "cpu/kernels.h"

namespace ik {

struct PixelCall : ImageCall {
  Penalty penalty = Penalty::l1;
  double param = 0;
  int regions = 1;  // 2: (hole, valid); mask_is_hole: the mask holds the first one's weight
  // pred holds `predictions` of one target, in the order of torch.cat; shape.samples counts them all.
  // Images are [N, segments, length], the target's N that of pred / predictions.
  int64_t predictions = 1;
  bool mask_per_prediction = false;  // the mask's batch is pred's, not target's
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

  static constexpr int64_t chunk = 8192;
  int64_t chunks() const { return (shape.length + chunk - 1) / chunk; }
  Unit unit(int64_t index) const { return unit_of(index, shape.length, chunk); }
  int64_t units() const { return shape.samples / predictions * segment_groups() * chunks(); }
};

}  // namespace ik

IK_DECLARE_PER_ISA(Kernels<PixelCall>, pixel_kernels)
