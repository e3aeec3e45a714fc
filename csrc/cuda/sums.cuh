// Sums over the threads of a warp and of a block, in a fixed order.
#pragma once

#include "cuda/cuda_utils.cuh"
#include "cuda/pixel.cuh"

namespace ik::cuda {

constexpr int kFinalThreads = 1024;
constexpr int kTotalThreads = 256;

// Adds each value over `lanes` neighbouring threads, a power of two; every thread gets the sums.
template <typename T, int K>
IK_DEVICE void sum_lanes(T (&value)[K], int lanes = kWarp) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < K; ++i) value[i] += __shfl_xor_sync(0xffffffffu, value[i], step);
  }
}

// Adds each value over the threads of a block of kBlock; every thread gets the sums.
template <int kBlock, typename T, int K>
IK_DEVICE void sum_block(T (&value)[K]) {
  constexpr int kWarps = kBlock / kWarp;
  __shared__ T warps[kWarps][K];
  sum_lanes(value);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp][i] = value[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < K; ++i) value[i] = warps[threadIdx.x % kWarps][i];
  sum_lanes(value, kWarps);
}

template <int kBlock>
IK_DEVICE double sum_block(double value) {
  double sum[1] = {value};
  sum_block<kBlock>(sum);
  return sum[0];
}

// One block for each total: the sum of its `count` parts, 0 if there are none.
template <typename T>
__global__ void __launch_bounds__(kTotalThreads)
    total_of_parts(const T* parts, int64_t count, float* totals) {
  const T* own = parts + static_cast<int64_t>(blockIdx.x) * count;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kTotalThreads) sum += own[i];
  sum = sum_block<kTotalThreads>(sum);
  if (threadIdx.x == 0) totals[blockIdx.x] = static_cast<float>(sum);
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

// The loss of one of kRegions regions where all samples have one scale, which is stored for each of them.
// Each thread of the last stage brings the sums over its samples.
template <int kRegions>
IK_DEVICE double loss_of_one_scale(Normalize normalize, double sum, double weight, double numel,
                                   int64_t samples, float* scales) {
  weight = sum_block<kFinalThreads>(weight);
  const double scale = sample_scale(normalize, 0.0, weight, numel, static_cast<double>(samples));
  for (int64_t n = threadIdx.x; n < samples; n += kFinalThreads) {
    scales[n * kRegions] = static_cast<float>(scale);
  }
  return sum_block<kFinalThreads>(sum) * scale;
}

static inline int finalize_lanes(int64_t samples, int64_t tiles) {
  int lanes = 1;
  while (lanes < tiles && lanes < kFinalThreads && lanes * 2 * samples <= kFinalThreads) lanes *= 2;
  return lanes;
}

}  // namespace ik::cuda
