// Interface between the kernels of stacked_images (stacked_images_kernels.cpp, one build per instruction set)
// and their registration.
#pragma once

#include <cstdint>

#include "common/pixel_shape.h"
#include "cpu/isa.h"

namespace ik {

enum class Dtype : int;

// The parts of a stacked batch, in the order of reference/stacked_images.py.
enum class Part : int { raw, composite, target, hole_raw, hole_target };

struct StackedCall {
  PixelShape shape;          // of pred
  int64_t out_channels = 0;  // those of pred, or any number where it has one
  const int64_t* parts = nullptr;
  int64_t part_count = 0;
  const double* scale = nullptr;  // [out_channels]
  const double* shift = nullptr;  // [out_channels]; forward
  bool swap = false;
  bool mask_is_hole = false;
  bool wide = false;  // compute in double

  const void* pred = nullptr;
  const void* target = nullptr;
  const void* mask = nullptr;
  Dtype pred_dtype{}, target_dtype{}, mask_dtype{}, stacked_dtype{};
  void* stacked = nullptr;  // written forward, its gradient read backward

  // Backward.
  void* grad_pred = nullptr;
  void* grad_target = nullptr;

  bool stream = false;  // write around the cache

  // A unit is a run of pixels of one sample, all channels.
  static constexpr int64_t unit_pixels = 4096;
  int64_t step() const { return shape.segments == 1 && shape.channels > 1 ? shape.channels : 1; }
  int64_t chunks() const { return (shape.pixels + unit_pixels - 1) / unit_pixels; }
  int64_t units() const { return shape.numel() > 0 ? shape.samples * chunks() : 0; }
};

using StackedKernel = void (*)(const StackedCall& call, int64_t unit_begin, int64_t unit_end);
struct StackedKernels {
  StackedKernel forward;
  StackedKernel backward;
};

}  // namespace ik

IK_DECLARE_PER_ISA(StackedKernels, stacked_kernels)
namespace ik {
namespace generic {
extern const StackedKernels stacked_kernels_wide;
}
}  // namespace ik
