// Interface between the kernels of SSIM (isa/ssim.cpp) and the op.
#pragma once

#include "cpu/kernels.h"

namespace ik {

// Largest distance of a pixel of the window from its centre.
constexpr int kMaxRadius = 7;

// (N, C, H, W) in any strides; 0 where a mask is broadcast.
struct StridedImage {
  void* data = nullptr;  // null: not there
  Dtype dtype{};
  int64_t stride_n = 0, stride_c = 0, stride_y = 0, stride_x = 0;  // elements

  int64_t offset(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return n * stride_n + c * stride_c + y * stride_y + x * stride_x;
  }
  const char* address(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return static_cast<const char*>(data) + offset(n, c, y, x) * dtype_bytes(dtype);
  }
  int64_t bytes_x() const { return stride_x * dtype_bytes(dtype); }
};

// Of the windows and pixels of one plane, or of the part of it in one unit.
struct SsimSums {
  double similarity = 0, contrast = 0, windows = 0;  // with the mask's weights; windows: these alone
  double l1 = 0, pixels = 0;                         // likewise

  void operator+=(const SsimSums& other) {
    similarity += other.similarity;
    contrast += other.contrast;
    windows += other.windows;
    l1 += other.l1;
    pixels += other.pixels;
  }
};

// d loss / d similarity and contrast of a window, and / d |pred - target| of a pixel, of weight 1.
struct SsimCoefficients {
  double similarity, contrast, l1;
};

struct SsimCall {
  int64_t samples = 0, channels = 0, height = 0, width = 0;
  StridedImage pred, target, mask;
  int radius = 0;
  double weights[kMaxRadius + 1] = {};  // of a row of the window, from its centre outwards
  bool same = false;                    // windows reach beyond the image
  double c1 = 0, c2 = 0;
  bool contrast = false, l1 = false;
  bool wide = false;  // compute in double

  SsimSums* sums = nullptr;                        // forward: [units, unit_channels]
  const SsimCoefficients* coefficients = nullptr;  // backward: [N, C]
  StridedImage grad_pred, grad_target;

  // A unit is a tile of the pixels of one plane, or of all planes of a sample that share a mask: its windows are
  // summed once. Units are fixed by the shape alone, so that results do not depend on the number of threads. Wide
  // tiles, for what is summed beyond their edges is summed again.
  int64_t tile_extent(int64_t extent, int64_t most) const {
    const int64_t tiles = (extent + most - 1) / most;
    return tiles == 0 ? 1 : ((extent + tiles - 1) / tiles + 15) / 16 * 16;
  }
  int64_t unit_channels() const { return mask.data != nullptr && mask.stride_c == 0 ? channels : 1; }
  int64_t tile_height() const { return tile_extent(height, 128); }
  int64_t tile_width() const { return tile_extent(width, mask.data != nullptr ? 128 : 256); }
  int64_t rows_of_tiles() const { return (height + tile_height() - 1) / tile_height(); }
  int64_t columns_of_tiles() const { return (width + tile_width() - 1) / tile_width(); }
  int64_t sample_units() const { return channels / unit_channels() * rows_of_tiles() * columns_of_tiles(); }
  int64_t units() const { return channels == 0 ? 0 : samples * sample_units(); }
};

}  // namespace ik

IK_DECLARE_PER_ISA(Kernels<SsimCall>, ssim_kernels)
