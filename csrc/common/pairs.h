// Options and denominators of total variation, shared by CPU and CUDA kernels.
#pragma once

#include "common/macros.h"

namespace ik {

// Which pairs of neighbouring pixels count, and what they weigh: ops/total_variation.py.
enum class Region : int { image, hole, dilated_hole, first_pixel };
enum class PairNormalize : int { pairs, image, mask };

// d tv / d (sum down), d tv / d (sum across). Nothing counted means 0, never 0/0.
IK_HD void pair_scales(PairNormalize normalize, double pairs_down, double pairs_across, double numel,
                       double region_sum, double* out) {
  double down = numel;
  double across = numel;
  if (normalize == PairNormalize::pairs) {
    down = pairs_down;
    across = pairs_across;
  } else if (normalize == PairNormalize::mask) {
    down = across = region_sum;
  }
  out[0] = down == 0.0 ? 0.0 : 1.0 / down;
  out[1] = across == 0.0 ? 0.0 : 1.0 / across;
}

}  // namespace ik
