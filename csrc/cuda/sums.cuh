// Sums over the threads of a warp and of a block, in a fixed order.
#pragma once

#include "cuda/pixel.cuh"

namespace ik::cuda {

constexpr int kFinalThreads = 1024;

// Adds each value over `lanes` neighbouring threads, a power of two; every thread gets the sums.
template <typename T, int K>
IK_DEVICE void sum_lanes(T (&value)[K], int lanes = kWarp) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < K; ++i) value[i] += __shfl_xor_sync(0xffffffffu, value[i], step);
  }
}

// Adds `value` over all threads in a fixed order; every thread gets the result.
IK_DEVICE double block_sum(double value) {
  __shared__ double warps[kFinalThreads / kWarp];
  double sum[1] = {value};
  sum_lanes(sum);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum[0];
  __syncthreads();
  sum[0] = warps[threadIdx.x % kWarp];
  sum_lanes(sum);
  return sum[0];
}

// Adds up what the tiles of every sample left, in a fixed order; for one block. `lanes` (power of two)
// threads work on a sample, 1024 / lanes samples at a time. `add(sample, tile, value)` adds a tile of a
// sample; `use(sample, value)` is called by the first lane of a sample, which gets its sums.
template <int kValues, typename Add, typename Use>
IK_DEVICE void sum_samples(int64_t samples, int64_t tiles, int lanes, const Add& add, const Use& use) {
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int at_once = kFinalThreads / lanes;
  const bool wide = lanes > kWarp;
  __shared__ double warp_sums[kFinalThreads / kWarp][kValues];
  // Tiles loaded at once: 1024 threads have 64 registers each.
  [[maybe_unused]] constexpr int kAhead = kValues > 4 ? 2 : 4;
  for (int64_t first = 0; first < samples; first += at_once) {
    const int64_t sample = first + static_cast<int>(threadIdx.x) / lanes;
    double value[kValues] = {};
    if (sample < samples) {
#pragma unroll kAhead
      for (int64_t tile = lane; tile < tiles; tile += lanes) add(sample, tile, value);
    }
    sum_lanes(value, wide ? kWarp : lanes);
    if (wide) {
      __syncthreads();
      if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) warp_sums[threadIdx.x / kWarp][i] = value[i];
      }
      __syncthreads();
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
          value[i] = 0.0;
          for (int w = 0; w < lanes / kWarp; ++w) value[i] += warp_sums[threadIdx.x / kWarp + w][i];
        }
      }
    }
    if (lane == 0 && sample < samples) use(sample, value);
  }
}

static inline int finalize_lanes(int64_t samples, int64_t tiles) {
  int lanes = 1;
  while (lanes < tiles && lanes < kFinalThreads && lanes * 2 * samples <= kFinalThreads) lanes *= 2;
  return lanes;
}

}  // namespace ik::cuda
