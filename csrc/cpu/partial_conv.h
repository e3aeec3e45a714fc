// Interface between the kernels of partial convolution (isa/partial_conv.cpp, isa/partial_conv_window.cpp)
// and the op.
#pragma once

#include "common/partial_conv.h"
#include "cpu/kernels.h"

namespace ik {

// A tensor [N, C, S] of S pixels, dense as [N, C, S] or, interleaved, as [N, S, C].
struct ImageView {
  void* data = nullptr;  // nullptr: not there
  Dtype dtype{};
  bool interleaved = false;
  int64_t stride_n = 0;  // elements; 0: one sample for all
  int64_t stride_c = 0;
  int64_t stride_s = 0;
};

// Planes [N or 1, G, S] of the type computed in; G divides C.
struct PlaneView {
  const void* data = nullptr;
  int64_t stride_n = 0;
  int64_t planes = 1;
};

// Everything an element-wise kernel reads and writes. Unit: (sample, tile of pixels), fixed by the shape
// alone: sums do not depend on the number of threads.
struct PartialConvCall {
  int64_t samples = 0;
  int64_t channels = 0;
  int64_t pixels = 0;
  ImageView source;  // input, raw or grad
  ImageView result;  // may be the source
  ImageView mask;    // mask_input: several channels
  ImageView output;  // finish_backward with an activation
  PlaneView single_mask;
  PlaneView ratio;
  PlaneView new_mask;
  const void* bias = nullptr;  // [C] of the type computed in
  void* bias_sums = nullptr;   // [units, C] of it, zeros
  Finish how;
  double slope = 0;
  // Rows of 8 KiB, and two planes of it in the first cache.
  static constexpr int64_t tile = 2048;
  int64_t tiles() const { return (pixels + tile - 1) / tile; }
  int64_t units() const { return samples * tiles(); }
};

// Sums of a mask over windows.
struct WindowCall : WindowShape {
  const void* mask = nullptr;
  Dtype mask_dtype{};
  int64_t multiplicity = 1;  // of a single channel
  double numerator = 0;
  MaskUpdate update = MaskUpdate::clamp;
  void* planes = nullptr;  // [N, G, D, H, W] of the type computed in: the mask summed over channels
  void* ratio = nullptr;
  void* new_mask = nullptr;
  static constexpr int64_t tile = 2048;
  int64_t pixels() const { return size[0] * size[1] * size[2]; }
  // The pixels of a channel are one run. Else its channels must be, at every pixel.
  bool flat() const {
    return mask_stride[4] == 1 && mask_stride[3] == size[2] &&
           (size[0] == 1 || mask_stride[2] == size[2] * size[1]);
  }
  int64_t sum_units() const { return samples * groups * ((pixels() + tile - 1) / tile); }
  int64_t rows() const { return samples * groups * out_size[0] * out_size[1]; }
};

struct PartialConvKernels {
  Kernel<PartialConvCall> mask_input, finish, finish_backward;
};

struct WindowKernels {
  Kernel<WindowCall> sum_channels, sum_windows;
};

}  // namespace ik

IK_DECLARE_PER_ISA(PartialConvKernels, partial_conv_kernels)
IK_DECLARE_PER_ISA(WindowKernels, window_kernels)
