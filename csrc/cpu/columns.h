// Interface between the kernels of channel columns (isa/columns.cpp) and the op lpips.
#pragma once

#include "cpu/kernels.h"

namespace ik {

// Two maps: `predictions` times `samples` of one against `samples` of the other. A unit is a block of pixels of one
// sample of the target, all channels, and of all predictions for that sample.
struct ColumnsCall {
  int64_t samples = 0;  // N of the target
  int64_t predictions = 1;
  int64_t channels = 0;
  int64_t pixels = 0;
  bool channels_last = false;
  bool wide = false;  // compute in double

  const void* input = nullptr;   // [k N, C, pixels], channels_last: [k N, pixels, C]
  const void* target = nullptr;  // [N, C, pixels] or [N, pixels, C]
  Dtype input_dtype{}, target_dtype{};
  const double* weights = nullptr;  // [C]
  double eps = 0;

  const void* mask = nullptr;  // a dense plane for each of 1, N or k N samples
  Dtype mask_dtype{};
  int64_t mask_stride = 0;  // elements between samples, 0 where all share one
  bool mask_per_prediction = false;

  // Per-pixel coefficients of ops/lpips.py, [4, k N, pixels] float or double: written forward, read backward.
  void* saved = nullptr;
  double* partials = nullptr;  // [units, k]: sums over the pixels of a unit; forward

  const double* factors = nullptr;  // [k N]: of every pixel of a sample, before the mask; backward
  void* grad_input = nullptr;
  void* grad_target = nullptr;
  bool stream = false;  // write the results around the cache

  int64_t block_pixels = 512;  // at most
  // Blocks of equal size, whole vectors of every build.
  int64_t step() const {
    const int64_t count = (pixels + block_pixels - 1) / block_pixels;
    return count > 0 ? ((pixels + count - 1) / count + 15) / 16 * 16 : 16;
  }
  int64_t blocks() const { return (pixels + step() - 1) / step(); }
  int64_t units() const { return samples * blocks(); }
};

}  // namespace ik

IK_DECLARE_PER_ISA(Kernels<ColumnsCall>, columns_kernels)
