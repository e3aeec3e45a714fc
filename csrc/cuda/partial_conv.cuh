// What the kernels of partial_conv around the library convolution share. Memory-bound: every image element is
// read and written once.
//
//   mask      out = input * mask, 0 where the mask is 0
//   finish    out = the layer's result from the convolution's, with ratio, new mask, bias and activation
//   backward  out = gradient by the convolution's result; sums of the gradient by the bias
//
// Masks and planes are shared by many channels, which decides the work split.
//   planar       NCHW: a thread keeps the plane values of 16 bytes of pixels and goes over channels. A mask
//                that agrees with the images element by element is a plane whose pixels are all elements.
//   interleaved  channels_last: a thread keeps its 16 bytes of channels and goes over pixels
//   any          images of two layouts or dtypes, or without whole vectors: tiles through shared memory
// `out` may be the source: one thread reads and writes an element, and loads of the source are plain ones.
#pragma once

#include "common/partial_conv.h"
#include "cuda/sums.cuh"

namespace ik::cuda {

enum class Part : int { mask, finish, backward };

// Vectors in flight per thread; the backward has two images.
template <Part kPart>
constexpr int kAtOnce = kPart == Part::backward ? 2 : 4;

// Plane value of channel c and pixel p of sample n: data[n * stride_n + c / channels * stride_plane + p *
// stride_pixel].
struct PlaneView {
  const void* data;       // the mask, or the ratio in float32; null: ones
  const float* new_mask;  // laid out like the ratio
  int64_t stride_n;
  int64_t stride_plane;
  int64_t stride_pixel;
  Divider channels;  // of a plane
  ElementType type;
  float cap;     // 1 for bool: any byte but 0 is true
  bool aligned;  // whole vectors of pixels
};

struct ImageView {
  const void* data;
  ElementType type;
  bool interleaved;
};

struct ImageArgs {
  ImageView source;  // input, raw or grad
  ImageView output;  // of the layer, backward with an activation only
  void* out;
  const void* bias;
  PlaneView planes;
  float* partials;  // sums by channel, [channels, partial_rows], or null
  int64_t partial_rows;
  int64_t pixels;
  Divider tiles_along;   // of pixels
  Divider tiles_across;  // of channels
  int32_t channels;
  int32_t lanes;  // any: of channels
  int32_t log_lanes;
  int32_t rounds;
  float slope;
  Finish how;
  ElementType bias_type;
  ElementType out_type;
  bool out_interleaved;
};

// The bias of some channels; beyond the last one anything that exists.
template <int K>
IK_DEVICE void load_bias(const ImageArgs& args, const int (&channels)[K], float (&bias)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) bias[k] = 0.0f;
  if (args.bias == nullptr) return;
  int64_t index[K];
#pragma unroll
  for (int k = 0; k < K; ++k) index[k] = channels[k] < args.channels ? channels[k] : args.channels - 1;
  gather(args.bias, args.bias_type, 1.0f, index, bias);
}

// One element; `weight` is the mask or the ratio. Adds the backward's bias gradient to `sum`.
template <Part kPart>
IK_DEVICE float part_element(const Finish& how, float slope, float x, float output, float weight,
                             float new_mask, float bias, float& sum) {
  if constexpr (kPart == Part::mask) {
    return select_zero_(weight, x * weight);
  } else if constexpr (kPart == Part::finish) {
    return finish(x, weight, new_mask, bias, slope, how);
  } else {
    const float g = finish_bias_grad(x, output, weight, new_mask, slope, how);
    sum += g;
    return finish_raw_grad(g, weight, how);
  }
}

template <typename M, int E>
IK_DEVICE void unpack_plane(const void* data, int64_t index, float (&values)[E]) {
  Pack<M, E> pack;
  load_pack_if(true, static_cast<const M*>(data) + index, pack);
  unpack(pack, values);
}

// Plane values of E consecutive pixels.
template <Part kPart, int E>
IK_DEVICE void load_planes(const PlaneView& planes, int64_t index, float (&weight)[E], float (&new_mask)[E]) {
  if constexpr (kPart != Part::mask) {
    unpack_plane<float>(planes.data, index, weight);
    unpack_plane<float>(planes.new_mask, index, new_mask);
  } else if (!planes.aligned) {
    int64_t indices[E];
#pragma unroll
    for (int k = 0; k < E; ++k) indices[k] = index + k;
    gather(planes.data, planes.type, planes.cap, indices, weight);
  } else if (planes.type == ElementType::u8) {
    unpack_plane<uint8_t>(planes.data, index, weight);
#pragma unroll
    for (int k = 0; k < E; ++k) weight[k] = min_(weight[k], planes.cap);
  } else {
    with_image_type(planes.type, [&](auto type) {
      unpack_plane<typename decltype(type)::type>(planes.data, index, weight);
    });
  }
}

// The tile of this block: pixels and channels count tiles.
struct BlockCoord {
  uint32_t along;
  uint32_t across;
  uint32_t sample;
};

IK_DEVICE BlockCoord block_coord(const ImageArgs& args) {
  BlockCoord coord;
  const uint32_t rest = args.tiles_along.quotient(blockIdx.x);
  coord.along = blockIdx.x - rest * args.tiles_along.divisor;
  coord.sample = args.tiles_across.quotient(rest);
  coord.across = rest - coord.sample * args.tiles_across.divisor;
  return coord;
}

// A tile's sum for one channel.
IK_DEVICE void store_sum(const ImageArgs& args, const BlockCoord& coord, int64_t channel, float sum) {
  const int64_t row = static_cast<int64_t>(coord.sample) * args.tiles_along.divisor + coord.along;
  args.partials[channel * args.partial_rows + row] = sum;
}

}  // namespace ik::cuda
