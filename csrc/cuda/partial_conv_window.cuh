// Kernels of partial_conv that read the mask: its channels summed, then what follows from windows over a
// plane.
//
//   plane_g = sum of the mask over the channels of group g (skipped where a group has one channel)
//   s = multiplicity * sum of plane_g over a window, zeros outside; ratio and new mask follow from s
//
// Every mask value is read once for the sum over channels; a plane is small next to the images of the layer,
// and the windows that share its values find them in L1. Sums in float32, exact for masks of 0 and 1.
#pragma once

#include "common/partial_conv.h"
#include "cuda/sums.cuh"

namespace ik::cuda {

constexpr int kWindowThreads = 256;
constexpr int kSumRows = kWindowThreads / kWarp;
// Mask values in flight per thread.
constexpr int kSumUnroll = 4;

template <typename M>
constexpr int kMaskElements = sizeof(M) == 4 ? 4 : 8;

struct ChannelSumArgs {
  const void* mask;
  float* planes;  // [N, groups, pixels]
  WindowShape shape;
  int64_t pixels;
  int64_t units;      // pixels of all samples and groups, interleaved only
  Divider tiles;      // of a plane, planar only
  Divider groups;     // per sample
  int32_t log_lanes;  // that add the channels of one pixel, interleaved only
  float cap;          // 1 for bool: any byte but 0 is true
};

// A 64-bit division costs several times a 32-bit one.
IK_DEVICE int64_t quotient(int64_t n, int64_t divisor) {
  return (n | divisor) <= UINT32_MAX ? static_cast<uint32_t>(n) / static_cast<uint32_t>(divisor)
                                     : n / divisor;
}

// E consecutive mask values: whole vectors for E > 1.
template <typename M, int E>
struct MaskVector {
  std::conditional_t<E == 1, M, Pack<M, E>> values;

  // Zeros unless `wanted`.
  __device__ __forceinline__ void load(const M* address, bool wanted) {
    if constexpr (E == 1) {
      values = wanted ? *address : M(0);
    } else {
      load_pack_if(wanted, address, values);
    }
  }
  __device__ __forceinline__ void add_to(float (&sums)[E], float cap) const {
    float own[E];
    if constexpr (E == 1) {
      own[0] = static_cast<float>(values);
    } else {
      unpack(values, own);
    }
#pragma unroll
    for (int k = 0; k < E; ++k) sums[k] += std::is_same_v<M, uint8_t> ? min_(own[k], cap) : own[k];
  }
};

// Any strides with E = 1, dense planes of whole vectors else. A warp goes along the pixels, the warps of a
// block share the channels.
template <typename M, int E>
__global__ void __launch_bounds__(kWindowThreads) partial_conv_sum_planar(const ChannelSumArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = static_cast<int>(threadIdx.x) / kWarp;
  const uint32_t plane = args.tiles.quotient(blockIdx.x);
  const uint32_t sample = args.groups.quotient(plane);
  const uint32_t group = plane - sample * args.groups.divisor;
  const int64_t first = static_cast<int64_t>(blockIdx.x - plane * args.tiles.divisor) * kWarp * E;
  const int64_t pixel = first + lane * E;
  const bool inside = pixel < args.pixels;
  const auto& [stride_n, stride_c, stride_z, stride_y, stride_x] = args.shape.mask_stride;
  const auto& [depth, height, width] = args.shape.size;
  const int64_t members = args.shape.members;
  int64_t offset = pixel;
  if constexpr (E == 1) {
    const int64_t line = quotient(pixel, width);
    const int64_t z = quotient(line, height);
    offset = z * stride_z + (line - z * height) * stride_y + (pixel - line * width) * stride_x;
  }
  const M* mask = static_cast<const M*>(args.mask) + sample * stride_n + group * members * stride_c + offset;
  float sums[E] = {};
#pragma unroll 1
  for (int64_t channel = row; channel < members; channel += kSumUnroll * kSumRows) {
    MaskVector<M, E> vectors[kSumUnroll];
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      const int64_t c = channel + u * kSumRows;
      vectors[u].load(mask + c * stride_c, inside && c < members);
    }
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) vectors[u].add_to(sums, args.cap);
  }
  __shared__ float shared[kSumRows][E][kWarp + 1];
#pragma unroll
  for (int k = 0; k < E; ++k) shared[row][k][lane] = sums[k];
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column >= kWarp * E || first + column >= args.pixels) return;
  float total = 0.0f;
#pragma unroll
  for (int r = 0; r < kSumRows; ++r) total += shared[r][column % E][column / E];
  args.planes[plane * args.pixels + first + column] = total;
}

// Dense channels_last: the lanes of a group of threads go along the channels of one pixel.
template <typename M, int E>
__global__ void __launch_bounds__(kWindowThreads) partial_conv_sum_interleaved(const ChannelSumArgs args) {
  const int64_t members = args.shape.members;
  const int lanes = 1 << args.log_lanes;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int hop = kWindowThreads >> args.log_lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * hop * kSumUnroll + (threadIdx.x >> args.log_lanes);
  float sums[kSumUnroll] = {};
#pragma unroll 1
  for (int64_t channel = lane * E; channel < members; channel += lanes * E) {
    MaskVector<M, E> vectors[kSumUnroll];
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      const int64_t unit = first + u * hop;
      vectors[u].load(static_cast<const M*>(args.mask) + unit * members + channel, unit < args.units);
    }
#pragma unroll
    for (int u = 0; u < kSumUnroll; ++u) {
      float values[E] = {};
      vectors[u].add_to(values, args.cap);
#pragma unroll
      for (int k = 0; k < E; ++k) sums[u] += values[k];
    }
  }
  sum_lanes(sums, lanes);
#pragma unroll
  for (int u = 0; u < kSumUnroll; ++u) {
    const int64_t unit = first + u * hop;
    if (lane != 0 || unit >= args.units) continue;
    int64_t to = unit;
    const int64_t groups = args.groups.divisor;
    if (groups > 1) {
      const int64_t position = quotient(unit, groups);  // pixel, counted over the samples
      const int64_t sample = quotient(position, args.pixels);
      to = (sample * groups + unit - position * groups) * args.pixels + position - sample * args.pixels;
    }
    args.planes[to] = sums[u];
  }
}

struct WindowArgs {
  const void* mask;
  float* ratio;     // [N, groups, outputs of a plane]
  float* new_mask;  // likewise
  int64_t total;
  WindowShape shape;
  float multiplicity;
  float numerator;
  float window;  // mask values in a window
  float cap;
  MaskUpdate update;
};

template <typename M>
__global__ void __launch_bounds__(kWindowThreads) partial_conv_windows(const WindowArgs args) {
  const WindowShape& shape = args.shape;
  const int64_t hop = static_cast<int64_t>(gridDim.x) * kWindowThreads;
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWindowThreads + threadIdx.x; i < args.total;
       i += hop) {
    int64_t rest = i;
    int64_t start[3];
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      const int64_t next = quotient(rest, shape.out_size[d]);
      start[d] = (rest - next * shape.out_size[d]) * shape.stride[d] - shape.padding[d];
      rest = next;
    }
    const int64_t sample = quotient(rest, shape.groups);
    const M* mask = static_cast<const M*>(args.mask) + sample * shape.mask_stride[0] +
                    (rest - sample * shape.groups) * shape.mask_stride[1];
    float sum = 0.0f;
#pragma unroll 1
    for (int a = 0; a < shape.kernel[0]; ++a) {
      const int64_t z = start[0] + a * shape.dilation[0];
      if (z < 0 || z >= shape.size[0]) continue;
#pragma unroll 1
      for (int b = 0; b < shape.kernel[1]; ++b) {
        const int64_t y = start[1] + b * shape.dilation[1];
        if (y < 0 || y >= shape.size[1]) continue;
        const M* line = mask + z * shape.mask_stride[2] + y * shape.mask_stride[3];
#pragma unroll 4
        for (int c = 0; c < shape.kernel[2]; ++c) {
          const int64_t x = start[2] + c * shape.dilation[2];
          if (x < 0 || x >= shape.size[2]) continue;
          const float value = static_cast<float>(line[x * shape.mask_stride[4]]);
          sum += std::is_same_v<M, uint8_t> ? min_(value, args.cap) : value;
        }
      }
    }
    sum *= args.multiplicity;
    args.ratio[i] = window_ratio(sum, args.numerator, 3.402823466e38f, args.update);
    args.new_mask[i] = window_mask(sum, args.window, args.update);
  }
}

}  // namespace ik::cuda
