// Host side that the operators of partial_conv share.
#pragma once

#include <limits>

#include "common/partial_conv_args.h"
#include "cuda/pixel_launch.cuh"

namespace ik::cuda {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

inline int64_t up(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

inline int log2_up(int64_t n) {
  int log = 0;
  while ((int64_t{1} << log) < n) ++log;
  return log;
}

inline float mask_cap(const Tensor& mask) { return mask.scalar_type() == ScalarType::Bool ? 1.0f : 255.0f; }

inline unsigned checked_grid(int64_t blocks, const char* argument) {
  STD_TORCH_CHECK(blocks <= kMost, argument, ": too many elements for one launch");
  return static_cast<unsigned>(blocks);
}

}  // namespace ik::cuda
