// Interface between the Gram kernels (isa/gram.cpp) and the ops gram and style.
#pragma once

#include "cpu/kernels.h"

namespace ik {

// One feature map of N samples, C channels and M = H*W pixels.
struct FeatureMap {
  const void* data = nullptr;  // [N, C, M], channels_last: [N, M, C]
  Dtype dtype{};
  int64_t samples = 0;
  int64_t channels = 0;
  int64_t pixels = 0;
  bool channels_last = false;
};

// Bands of a triangle in an order in which neighbours together have the same area: a thread gets a run of
// them.
inline int64_t balanced(int64_t index, int64_t count) {
  return index % 2 == 0 ? index / 2 : count - 1 - index / 2;
}

// Partial Gram matrices: unit (sample, part, band) adds up features * features^T over one part of the pixels,
// for one band of rows and the lower triangle. Fixed by the shape alone: results do not depend on the number
// of threads.
struct GramCall {
  FeatureMap map;
  void* partials = nullptr;  // [N, parts, C, C] float or double, lower triangle
  static constexpr int64_t band = 128;
  static constexpr int64_t max_parts = 16;
  int64_t part_pixels() const {
    const int64_t even = (map.pixels + max_parts - 1) / max_parts;
    return even > 8192 ? even : 8192;
  }
  int64_t parts() const { return (map.pixels + part_pixels() - 1) / part_pixels(); }
  int64_t bands() const { return (map.channels + band - 1) / band; }
  int64_t units() const { return map.samples * parts() * bands(); }
};

// out[n] = factor[n] * features[n], factor symmetric; unit (sample, block of pixels, band of channels). Small
// maps of many channels are one block each: bands give every thread some of it.
struct SymmetricProductCall {
  FeatureMap map;
  const void* factor = nullptr;  // [N, C, padded_cols] float or double, zero beyond C
  void* out = nullptr;           // layout and dtype of the features
  bool stream = false;           // write around the cache
  static constexpr int64_t block = 960;
  static constexpr int64_t band = 192;  // a multiple of the register tile of every build
  // A multiple of the register tile of every build.
  static int64_t padded_cols(int64_t channels) { return (channels + 31) / 32 * 32; }
  int64_t blocks() const { return (map.pixels + block - 1) / block; }
  int64_t bands() const { return map.pixels < block ? (map.channels + band - 1) / band : 1; }
  int64_t units() const { return map.samples * blocks() * bands(); }
};

struct GramKernels {
  Kernel<GramCall> gram;
  Kernel<SymmetricProductCall> symmetric_product;
};

}  // namespace ik

IK_DECLARE_PER_ISA(GramKernels, gram_kernels)
