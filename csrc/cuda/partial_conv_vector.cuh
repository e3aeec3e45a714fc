// Kernels of partial_conv on whole vectors of 16 bytes. Work split: partial_conv.cuh.
#pragma once

#include "cuda/partial_conv.cuh"

namespace ik::cuda {

constexpr int kInterleavedThreads = 256;
constexpr int kMaxSlots = 32;  // channels of a thread, planar

// A tile is `lanes` vectors of pixels by rounds * kAtOnce channels of each of 128 / lanes rows of threads.
template <Part kPart, typename T>
__global__ void __launch_bounds__(kThreads) partial_conv_planar(const ImageArgs args) {
  constexpr int E = 16 / static_cast<int>(sizeof(T));
  constexpr int U = kAtOnce<kPart>;
  const BlockCoord coord = block_coord(args);
  const int lane = static_cast<int>(threadIdx.x) & (args.lanes - 1);
  const int row = static_cast<int>(threadIdx.x) >> args.log_lanes;
  const int rows = kThreads >> args.log_lanes;
  const int begin = static_cast<int>(coord.across) * rows * U * args.rounds;
  const int64_t pixel = (static_cast<int64_t>(coord.along) * args.lanes + lane) * E;
  const bool inside = pixel < args.pixels;
  const int64_t base = static_cast<int64_t>(coord.sample) * args.channels * args.pixels + pixel;
  const int64_t plane_base = static_cast<int64_t>(coord.sample) * args.planes.stride_n + pixel;
  float weight[E] = {};
  float new_mask[E] = {};
  uint32_t current = UINT32_MAX;
  [[maybe_unused]] __shared__ float warp_sums[kThreads / kWarp][kMaxSlots];
#pragma unroll 1
  for (int round = 0; round < args.rounds; ++round) {
    Pack<T, E> source[U];
    [[maybe_unused]] Pack<T, E> output[U];
    int channels[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int channel = begin + (round * U + u) * rows + row;
      channels[u] = channel;
      const int64_t offset = base + channel * args.pixels;
      const bool wanted = inside && channel < args.channels;
      load_pack_if<false>(wanted, static_cast<const T*>(args.source.data) + offset, source[u]);
      if constexpr (kPart == Part::backward) {
        const bool has_output = wanted && args.output.data != nullptr;
        load_pack_if(has_output, static_cast<const T*>(args.output.data) + offset, output[u]);
      }
    }
    [[maybe_unused]] float bias[U] = {};
    if constexpr (kPart == Part::finish) load_bias(args, channels, bias);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int channel = channels[u];
      const bool wanted = inside && channel < args.channels;
      if (wanted) {
        const uint32_t plane = args.planes.channels.quotient(static_cast<uint32_t>(channel));
        if (plane != current) {
          load_planes<kPart>(args.planes, plane_base + plane * args.planes.stride_plane, weight, new_mask);
          current = plane;
        }
      }
      float values[E];
      [[maybe_unused]] float outputs[E] = {};
      unpack(source[u], values);
      if constexpr (kPart == Part::backward) unpack(output[u], outputs);
      float sum[1] = {};
#pragma unroll
      for (int k = 0; k < E; ++k) {
        values[k] = part_element<kPart>(args.how, args.slope, values[k], outputs[k], weight[k], new_mask[k],
                                        bias[u], sum[0]);
      }
      store_values(static_cast<T*>(args.out) + base + channel * args.pixels, values, wanted ? E : 0, true);
      if constexpr (kPart == Part::backward) {
        if (args.partials == nullptr) continue;
        // What is not wanted is 0.
        sum_lanes(sum, args.lanes < kWarp ? args.lanes : kWarp);
        if (args.lanes <= kWarp) {
          if (lane == 0 && channel < args.channels) store_sum(args, coord, channel, sum[0]);
        } else if (lane % kWarp == 0) {
          warp_sums[threadIdx.x / kWarp][round * U + u] = sum[0];
        }
      }
    }
  }
  if constexpr (kPart == Part::backward) {
    if (args.partials == nullptr || args.lanes <= kWarp) return;
    __syncthreads();
    const int slot = static_cast<int>(threadIdx.x) % kMaxSlots;
    const int of_row = static_cast<int>(threadIdx.x) / kMaxSlots;
    const int channel = begin + slot * rows + of_row;
    if (of_row >= rows || slot >= args.rounds * U || channel >= args.channels) return;
    const int warps = args.lanes / kWarp;
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += warp_sums[of_row * warps + w][slot];
    store_sum(args, coord, channel, sum);
  }
}

// A tile is `lanes` vectors of channels by rounds * kAtOnce pixels of each of 256 / lanes rows of threads.
template <Part kPart, typename T>
__global__ void __launch_bounds__(kInterleavedThreads) partial_conv_interleaved(const ImageArgs args) {
  constexpr int E = 16 / static_cast<int>(sizeof(T));
  constexpr int U = kAtOnce<kPart>;
  const BlockCoord coord = block_coord(args);
  const int row = static_cast<int>(threadIdx.x / static_cast<uint32_t>(args.lanes));
  const int lane = static_cast<int>(threadIdx.x) - row * args.lanes;
  const int rows = kInterleavedThreads / args.lanes;
  const int channel = (static_cast<int>(coord.across) * args.lanes + lane) * E;
  const bool active = row < rows && channel < args.channels;
  const int64_t base = static_cast<int64_t>(coord.sample) * args.pixels;
  const uint32_t plane = active ? args.planes.channels.quotient(static_cast<uint32_t>(channel)) : 0;
  const int64_t plane_base =
      static_cast<int64_t>(coord.sample) * args.planes.stride_n + plane * args.planes.stride_plane;
  [[maybe_unused]] float bias[E] = {};
  if constexpr (kPart == Part::finish) {
    int channels[E];
#pragma unroll
    for (int k = 0; k < E; ++k) channels[k] = channel + k;
    load_bias(args, channels, bias);
  }
  float sums[E] = {};
#pragma unroll 1
  for (int round = 0; round < args.rounds; ++round) {
    Pack<T, E> source[U];
    [[maybe_unused]] Pack<T, E> output[U];
    int64_t pixel[U];
    int64_t index[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      pixel[u] = ((static_cast<int64_t>(coord.along) * args.rounds + round) * U + u) * rows + row;
      const bool wanted = active && pixel[u] < args.pixels;
      const int64_t offset = (base + pixel[u]) * args.channels + channel;
      load_pack_if<false>(wanted, static_cast<const T*>(args.source.data) + offset, source[u]);
      if constexpr (kPart == Part::backward) {
        const bool has_output = wanted && args.output.data != nullptr;
        load_pack_if(has_output, static_cast<const T*>(args.output.data) + offset, output[u]);
      }
      index[u] = plane_base + (pixel[u] < args.pixels ? pixel[u] : args.pixels - 1);
    }
    float weight[U];
    [[maybe_unused]] float new_mask[U] = {};
    if constexpr (kPart == Part::mask) {
      gather(args.planes.data, args.planes.type, args.planes.cap, index, weight);
    } else {
      gather_as<float>(args.planes.data, index, weight);
      gather_as<float>(args.planes.new_mask, index, new_mask);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float values[E];
      [[maybe_unused]] float outputs[E] = {};
      unpack(source[u], values);
      if constexpr (kPart == Part::backward) unpack(output[u], outputs);
#pragma unroll
      for (int k = 0; k < E; ++k) {
        values[k] = part_element<kPart>(args.how, args.slope, values[k], outputs[k], weight[u], new_mask[u],
                                        bias[k], sums[k]);
      }
      const int valid = active && pixel[u] < args.pixels ? E : 0;
      const int64_t offset = (base + pixel[u]) * args.channels + channel;
      store_values(static_cast<T*>(args.out) + offset, values, valid, true);
    }
  }
  if constexpr (kPart == Part::backward) {
    if (args.partials == nullptr) return;
    __shared__ float shared[E][kInterleavedThreads];
    int half = 1;
    while (half < rows) half *= 2;
    for (half /= 2; half > 0; half /= 2) {
#pragma unroll
      for (int k = 0; k < E; ++k) shared[k][threadIdx.x] = sums[k];
      __syncthreads();
      if (row < half && row + half < rows) {
#pragma unroll
        for (int k = 0; k < E; ++k) sums[k] += shared[k][threadIdx.x + half * args.lanes];
      }
      __syncthreads();
    }
    if (row != 0 || !active) return;
#pragma unroll
    for (int k = 0; k < E; ++k) store_sum(args, coord, channel + k, sums[k]);
  }
}

}  // namespace ik::cuda
