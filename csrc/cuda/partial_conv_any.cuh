// Kernels of partial_conv for what the vector kernels of partial_conv.cuh do not take, and its sums by
// channel.
#pragma once

#include "cuda/partial_conv.cuh"

namespace ik::cuda {

constexpr int kAnyThreads = 256;
constexpr int kAnyEach = 4;  // elements of a thread
constexpr int kAnyTile = kAnyThreads * kAnyEach;
constexpr int kAnyChannels = 256;  // of a tile, at most

// A tile of args.lanes channels by kAnyTile / args.lanes pixels.
struct AnyTile {
  int64_t sample;
  int64_t channels;
  int64_t pixels;
  int64_t first_channel;
  int64_t first_pixel;
  int log_lanes;
  int log_width;

  // Channel and pixel within the tile of its element i, in the order of a layout.
  __device__ int channel(int i, bool interleaved) const {
    return interleaved ? i & ((1 << log_lanes) - 1) : i >> log_width;
  }
  __device__ int pixel(int i, bool interleaved) const {
    return interleaved ? i >> log_lanes : i & ((1 << log_width) - 1);
  }
  __device__ bool holds(int channel, int pixel) const {
    return first_channel + channel < channels && first_pixel + pixel < pixels;
  }
  // Beyond the image: an element that exists.
  __device__ int64_t offset(int channel, int pixel, bool interleaved) const {
    const int64_t c = first_channel + channel < channels ? first_channel + channel : channels - 1;
    const int64_t p = first_pixel + pixel < pixels ? first_pixel + pixel : pixels - 1;
    const int64_t base = sample * channels * pixels;
    return base + (interleaved ? p * channels + c : c * pixels + p);
  }
  // In shared memory; the odd pitch keeps both orders free of bank conflicts.
  __device__ int place(int channel, int pixel) const { return channel * ((1 << log_width) + 1) + pixel; }
};

using SharedTile = float[kAnyTile + kAnyChannels];

// The image's elements of this thread, in the order of `out_interleaved`; through `shared` if that is not its
// own.
IK_DEVICE void load_any(const AnyTile& tile, const void* image, MaskType type, bool interleaved,
                        bool out_interleaved, SharedTile& shared, float (&values)[kAnyEach]) {
  const int thread = static_cast<int>(threadIdx.x);
  int64_t index[kAnyEach];
#pragma unroll
  for (int k = 0; k < kAnyEach; ++k) {
    const int i = thread + k * kAnyThreads;
    index[k] = tile.offset(tile.channel(i, interleaved), tile.pixel(i, interleaved), interleaved);
  }
  gather(image, type, 255.0f, index, values);
  if (interleaved == out_interleaved) return;
#pragma unroll
  for (int k = 0; k < kAnyEach; ++k) {
    const int i = thread + k * kAnyThreads;
    shared[tile.place(tile.channel(i, interleaved), tile.pixel(i, interleaved))] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kAnyEach; ++k) {
    const int i = thread + k * kAnyThreads;
    values[k] = shared[tile.place(tile.channel(i, out_interleaved), tile.pixel(i, out_interleaved))];
  }
}

template <typename T>
IK_DEVICE void store_as(void* out, int64_t index, float value) {
  static_cast<T*>(out)[index] = static_cast<T>(value);
}

IK_DEVICE void store_any(void* out, MaskType type, int64_t index, float value) {
  if (type == MaskType::f32) {
    store_as<float>(out, index, value);
  } else if (type == MaskType::f16) {
    store_as<Half>(out, index, value);
  } else {
    store_as<BFloat16>(out, index, value);
  }
}

template <Part kPart>
__global__ void __launch_bounds__(kAnyThreads) partial_conv_any(const ImageArgs args) {
  const TilePlace place = tile_place(args);
  const int thread = static_cast<int>(threadIdx.x);
  int log_tile = 0;
  while ((1 << log_tile) < kAnyTile) ++log_tile;
  AnyTile tile;
  tile.sample = place.sample;
  tile.channels = args.channels;
  tile.pixels = args.pixels;
  tile.log_lanes = args.log_lanes;
  tile.log_width = log_tile - args.log_lanes;
  tile.first_channel = static_cast<int64_t>(place.across) << tile.log_lanes;
  tile.first_pixel = static_cast<int64_t>(place.along) << tile.log_width;
  const bool order = args.out_interleaved;

  __shared__ SharedTile source_tile;
  float source[kAnyEach];
  load_any(tile, args.source, args.source_type, args.source_interleaved, order, source_tile, source);
  [[maybe_unused]] float output[kAnyEach] = {};
  if constexpr (kPart == Part::backward) {
    __shared__ SharedTile output_tile;
    if (args.output != nullptr) {
      load_any(tile, args.output, args.output_type, args.output_interleaved, order, output_tile, output);
    }
  }
  int64_t index[kAnyEach];
#pragma unroll
  for (int k = 0; k < kAnyEach; ++k) {
    const int i = thread + k * kAnyThreads;
    const int channel = tile.channel(i, order);
    const int pixel = tile.pixel(i, order);
    const bool holds = tile.holds(channel, pixel);
    const int64_t c = holds ? tile.first_channel + channel : 0;
    const int64_t p = holds ? tile.first_pixel + pixel : 0;
    const int64_t plane = args.planes.channels.quotient(static_cast<uint32_t>(c));
    index[k] =
        tile.sample * args.planes.stride_n + plane * args.planes.stride_plane + p * args.planes.stride_pixel;
  }
  float weight[kAnyEach];
  [[maybe_unused]] float new_mask[kAnyEach] = {};
  gather(args.planes.data, args.planes.type, args.planes.cap, index, weight);
  if constexpr (kPart != Part::mask) gather_as<float>(args.planes.new_mask, index, new_mask);

  [[maybe_unused]] float bias[kAnyEach] = {};
  if constexpr (kPart == Part::finish) {
    int channels[kAnyEach];
#pragma unroll
    for (int k = 0; k < kAnyEach; ++k) {
      channels[k] = static_cast<int>(tile.first_channel) + tile.channel(thread + k * kAnyThreads, order);
    }
    load_bias(args, channels, bias);
  }
#pragma unroll
  for (int k = 0; k < kAnyEach; ++k) {
    const int i = thread + k * kAnyThreads;
    const int channel = tile.channel(i, order);
    const int pixel = tile.pixel(i, order);
    const bool holds = tile.holds(channel, pixel);
    float sum = 0.0f;
    const float value =
        part_element<kPart>(args.how, args.slope, source[k], output[k], weight[k], new_mask[k], bias[k], sum);
    if (holds) store_any(args.out, args.out_type, tile.offset(channel, pixel, order), value);
    // Read from there, if at all, by this thread.
    if constexpr (kPart == Part::backward) source_tile[tile.place(channel, pixel)] = holds ? sum : 0.0f;
  }
  if constexpr (kPart == Part::backward) {
    if (args.partials == nullptr) return;
    __syncthreads();
    const int lane = thread % kWarp;
#pragma unroll 1
    for (int channel = thread / kWarp; channel < 1 << tile.log_lanes; channel += kAnyThreads / kWarp) {
      float sum = 0.0f;
      for (int pixel = lane; pixel < 1 << tile.log_width; pixel += kWarp) {
        sum += source_tile[tile.place(channel, pixel)];
      }
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == 0 && tile.first_channel + channel < args.channels) {
        store_sum(args, place, tile.first_channel + channel, sum);
      }
    }
  }
}

// One block a channel: the tiles' sums in a fixed order, 0 if there are none.
static __global__ void __launch_bounds__(kAnyThreads)
    partial_conv_bias_total(const float* partials, int64_t rows, float* bias_grad) {
  const float* mine = partials + static_cast<int64_t>(blockIdx.x) * rows;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < rows; i += kAnyThreads) sum += mine[i];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  __shared__ double warp_sums[kAnyThreads / kWarp];
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0.0;
  for (int w = 0; w < kAnyThreads / kWarp; ++w) total += warp_sums[w];
  bias_grad[blockIdx.x] = static_cast<float>(total);
}

}  // namespace ik::cuda
