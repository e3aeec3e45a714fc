// Interface between the kernels of stacked_images (isa/stacked_images.cpp) and the op.
#pragma once

#include "cpu/kernels.h"

namespace ik {

// The parts of a stacked batch, in the order of reference/stacked_images.py.
enum class Part : int { raw, composite, target, hole_raw, hole_target };

struct StackedCall : ImageCall {
  int64_t out_channels = 0;  // those of pred, or any number where it has one
  const int64_t* parts = nullptr;
  int64_t part_count = 0;
  const double* scale = nullptr;  // [out_channels]
  const double* shift = nullptr;  // [out_channels]; forward
  bool swap = false;
  void* stacked = nullptr;  // written forward, its gradient read backward
  Dtype stacked_dtype{};

  // A unit is a run of pixels of one sample, all channels.
  static constexpr int64_t unit_pixels = 4096;
  int64_t step() const { return shape.segments == 1 && shape.channels > 1 ? shape.channels : 1; }
  int64_t chunks() const { return (shape.pixels + unit_pixels - 1) / unit_pixels; }
  int64_t units() const { return shape.numel() > 0 ? shape.samples * chunks() : 0; }
};

}  // namespace ik

IK_DECLARE_PER_ISA(Kernels<StackedCall>, stacked_kernels)
