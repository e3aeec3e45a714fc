// Kernel of partial_conv for what the vector kernels of partial_conv_vector.cuh do not take.
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
  __device__ int shared_index(int channel, int pixel) const {
    return channel * ((1 << log_width) + 1) + pixel;
  }
};

using SharedTile = float[kAnyTile + kAnyChannels];

// The image's elements of this thread, in the order of `out_interleaved`; through `shared` if that is not its
// own.
IK_DEVICE void load_any(const AnyTile& tile, const ImageView& image, bool out_interleaved, SharedTile& shared,
                        float (&values)[kAnyEach]) {
  const bool interleaved = image.interleaved;
  const int thread = static_cast<int>(threadIdx.x);
  int64_t index[kAnyEach];
#pragma unroll
  for (int k = 0; k < kAnyEach; ++k) {
    const int i = thread + k * kAnyThreads;
    index[k] = tile.offset(tile.channel(i, interleaved), tile.pixel(i, interleaved), interleaved);
  }
  gather(image.data, image.type, 255.0f, index, values);
  if (interleaved == out_interleaved) return;
#pragma unroll
  for (int k = 0; k < kAnyEach; ++k) {
    const int i = thread + k * kAnyThreads;
    shared[tile.shared_index(tile.channel(i, interleaved), tile.pixel(i, interleaved))] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kAnyEach; ++k) {
    const int i = thread + k * kAnyThreads;
    values[k] = shared[tile.shared_index(tile.channel(i, out_interleaved), tile.pixel(i, out_interleaved))];
  }
}

template <Part kPart>
__global__ void __launch_bounds__(kAnyThreads) partial_conv_any(const ImageArgs args) {
  const BlockCoord coord = block_coord(args);
  const int thread = static_cast<int>(threadIdx.x);
  int log_tile = 0;
  while ((1 << log_tile) < kAnyTile) ++log_tile;
  AnyTile tile;
  tile.sample = coord.sample;
  tile.channels = args.channels;
  tile.pixels = args.pixels;
  tile.log_lanes = args.log_lanes;
  tile.log_width = log_tile - args.log_lanes;
  tile.first_channel = static_cast<int64_t>(coord.across) << tile.log_lanes;
  tile.first_pixel = static_cast<int64_t>(coord.along) << tile.log_width;
  const bool order = args.out_interleaved;

  __shared__ SharedTile source_tile;
  float source[kAnyEach];
  load_any(tile, args.source, order, source_tile, source);
  [[maybe_unused]] float output[kAnyEach] = {};
  if constexpr (kPart == Part::backward) {
    __shared__ SharedTile output_tile;
    if (args.output.data != nullptr) load_any(tile, args.output, order, output_tile, output);
  }
  int channel[kAnyEach];  // within the tile
  int pixel[kAnyEach];
  int channels[kAnyEach];
  int64_t index[kAnyEach];  // of the planes
#pragma unroll
  for (int k = 0; k < kAnyEach; ++k) {
    const int i = thread + k * kAnyThreads;
    channel[k] = tile.channel(i, order);
    pixel[k] = tile.pixel(i, order);
    channels[k] = static_cast<int>(tile.first_channel) + channel[k];
    const bool holds = tile.holds(channel[k], pixel[k]);
    const int64_t plane = args.planes.channels.quotient(holds ? static_cast<uint32_t>(channels[k]) : 0u);
    index[k] = tile.sample * args.planes.stride_n + plane * args.planes.stride_plane +
               (holds ? tile.first_pixel + pixel[k] : 0) * args.planes.stride_pixel;
  }
  float weight[kAnyEach];
  [[maybe_unused]] float new_mask[kAnyEach] = {};
  [[maybe_unused]] float bias[kAnyEach] = {};
  gather(args.planes.data, args.planes.type, args.planes.cap, index, weight);
  if constexpr (kPart != Part::mask) gather_as<float>(args.planes.new_mask, index, new_mask);
  if constexpr (kPart == Part::finish) load_bias(args, channels, bias);
#pragma unroll
  for (int k = 0; k < kAnyEach; ++k) {
    const bool holds = tile.holds(channel[k], pixel[k]);
    float sum = 0.0f;
    const float value =
        part_element<kPart>(args.how, args.slope, source[k], output[k], weight[k], new_mask[k], bias[k], sum);
    with_image_type(args.out_type, [&](auto type) {
      using T = typename decltype(type)::type;
      T* out = static_cast<T*>(args.out) + tile.offset(channel[k], pixel[k], order);
      if (holds) *out = static_cast<T>(value);
    });
    // Read from there, if at all, by this thread.
    if constexpr (kPart == Part::backward)
      source_tile[tile.shared_index(channel[k], pixel[k])] = holds ? sum : 0.0f;
  }
  if constexpr (kPart == Part::backward) {
    if (args.partials == nullptr) return;
    __syncthreads();
    const int lane = thread % kWarp;
#pragma unroll 1
    for (int channel = thread / kWarp; channel < 1 << tile.log_lanes; channel += kAnyThreads / kWarp) {
      float sum[1] = {};
      for (int pixel = lane; pixel < 1 << tile.log_width; pixel += kWarp) {
        sum[0] += source_tile[tile.shared_index(channel, pixel)];
      }
      sum_lanes(sum);
      if (lane == 0 && tile.first_channel + channel < args.channels) {
        store_sum(args, coord, tile.first_channel + channel, sum[0]);
      }
    }
  }
}

}  // namespace ik::cuda
