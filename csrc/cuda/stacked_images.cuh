// Kernels of stacked_images: the images read once and every part written once; backward the other way round.
//
// Tiles, vectors and weights are those of the pixel losses (pixel.cuh), cut over the images. Forward: a
// thread loads its vectors of pred and target, then goes over the parts. Backward: it goes over the parts
// with the sums of its vectors in registers. Per element, fp32, the parts raw, composite, target: forward 8 +
// 4/C read, 12 written; backward to pred 8 + 4/C read, 4 written.
//
// In channels_last the channel changes from element to element. A swap then pairs elements that lie apart:
// what is read comes element by element (its neighbours from L1), what is written goes in whole vectors.
#pragma once

#include "cuda/pixel.cuh"

namespace ik::cuda {

// Of parts, and of channels with constants of their own: they travel as kernel parameters.
constexpr int kMostParts = 64;
constexpr int kMostConstants = 64;

// The weight of an image in a part: 0, 1, the mask, or what the mask leaves to 1.
enum class Share : uint8_t { none, all, mask, rest };

struct PartShares {
  Share share[2];  // of pred and target; backward of the gradients that are wanted
  uint8_t place;   // of the part in the stacked batch
};

struct Affine {
  float scale, shift;
};

struct StackedArgs {
  Tiling tiling;  // of an image
  MaskView mask;
  const void* image[2];  // [N, segments, length] pred and target, null where no part shows it; forward
  void* gradient[2];     // [N, segments, length] of PartShares::share; backward
  void* stacked;         // [parts, N, out_segments, length] written forward, its gradient read backward
  int64_t samples;
  int32_t out_segments;
  int32_t copies;    // out segments of a segment: a single channel is replicated
  int32_t channels;  // of a pixel in memory: 1 in NCHW
  int32_t parts;
  int32_t constants;  // 1, or one for every out channel
  bool swap;          // out segments in reverse order
  bool reversed;      // the channels of a pixel are read in reverse order
  bool aligned;       // everything that is not read in reverse allows whole vectors
  PartShares part[kMostParts];
  Affine constant[kMostConstants];  // of an out segment, or of a place in a pixel
};

// The place of an element in its pixel, in channels_last.
IK_DEVICE int place_in_pixel(const StackedArgs& args, int64_t element) {
  // A 64-bit division costs several times a 32-bit one.
  if (element <= INT32_MAX) return static_cast<uint32_t>(element) % static_cast<uint32_t>(args.channels);
  return static_cast<int>(element % args.channels);
}

// A stretch of an image as it lies in the stacked batch.
IK_DEVICE Stretch stacked_stretch(const StackedArgs& args, Stretch s, int place, int copy) {
  const int out = args.swap ? args.out_segments - 1 - s.channel : s.channel + copy;
  s.segment = (place * args.samples + s.sample) * args.out_segments + out;
  s.channel = out;
  return s;
}

template <typename T, int E>
IK_DEVICE void load_reversed(const StackedArgs& args, const T* image, const Stretch& s,
                             Pack<T, E> (&packs)[kVectors]) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t start = s.start + v * s.step;
    int place = place_in_pixel(args, start);
    int offset[E];
#pragma unroll
    for (int k = 0; k < E; ++k) {
      offset[k] = k + args.channels - 1 - 2 * place;
      if (++place == args.channels) place = 0;
    }
    load_pack_each(image + s.segment * args.tiling.length + start, offset, s.valid<E>(v), packs[v]);
  }
}

template <typename T, int E>
IK_DEVICE void load_stretch(const StackedArgs& args, const void* image, const Stretch& s,
                            Pack<T, E> (&packs)[kVectors]) {
  if (args.reversed) {
    load_reversed(args, static_cast<const T*>(image), s, packs);
  } else if (args.aligned) {
    load_values<true>(image, args.tiling, s, packs);
  } else {
    load_values<false>(image, args.tiling, s, packs);
  }
}

IK_DEVICE void load_constants(const StackedArgs& args, Affine (&constants)[kMostConstants]) {
  if (threadIdx.x < kMostConstants) constants[threadIdx.x] = args.constant[threadIdx.x];
  __syncthreads();
}

// Whether the constants change from element to element, not from segment to segment.
IK_DEVICE bool by_element(const StackedArgs& args) { return args.channels > 1 && args.constants > 1; }

// Those of a stretch of the stacked batch, unless they change by element.
IK_DEVICE Affine segment_constants(const StackedArgs& args, const Affine (&constants)[kMostConstants],
                                   const Stretch& s) {
  return constants[args.channels == 1 && args.constants > 1 ? s.channel : 0];
}

// Those of vector v of a stretch, if they do.
template <int E>
IK_DEVICE void element_constants(const StackedArgs& args, const Affine (&constants)[kMostConstants],
                                 const Stretch& s, int v, Affine (&found)[E]) {
  int place = place_in_pixel(args, s.start + v * s.step);
#pragma unroll
  for (int k = 0; k < E; ++k) {
    found[k] = constants[place];
    if (++place == args.channels) place = 0;
  }
}

// Adds what a part shows of an image. The map is linear: backward, what a part's gradient sends to it.
template <int E>
IK_DEVICE void add_share(Share share, const float (&values)[E], const float (&mask)[E], float (&sum)[E]) {
  if (share == Share::none) return;
  if (share == Share::all) {
#pragma unroll
    for (int k = 0; k < E; ++k) sum[k] += values[k];
    return;
  }
#pragma unroll
  for (int k = 0; k < E; ++k) {
    const float weight = share == Share::mask ? mask[k] : 1.0f - mask[k];
    sum[k] += select_zero_(weight, weight * values[k]);
  }
}

// Reads the mask of a round, each value as rarely as its shape allows.
template <int E>
IK_DEVICE void update_mask(const StackedArgs& args, const Place& place, int round, Weights<E>& weights) {
  if (round > 0 && args.mask.shared) return;
#pragma unroll 1
  for (int u = 0; u < (args.mask.shared ? 1 : kUnroll); ++u) {
    load_mask(args.mask, place.stretch<E>(args.tiling, round, u), u, weights);
  }
}

template <int E>
IK_DEVICE void get_mask(const StackedArgs& args, const Weights<E>& weights, int u, int v, float (&mask)[E]) {
#pragma unroll
  for (int k = 0; k < E; ++k) mask[k] = weights.at(args.mask.shared ? 0 : u, v, k);
}

// The wider of two image types.
template <typename P, typename T>
using Wider = std::conditional_t<std::is_same_v<P, T>, P, float>;

// Stands for a gradient that is not wanted.
struct Nothing {};

template <typename... Types>
constexpr int kStackedElements = ((sizeof(Types) == 4) || ...) ? 4 : 8;

// Blocks per multiprocessor: caps of 96, 128 and 168 registers, what every architecture needs not to spill.
template <typename P, typename T>
constexpr int kForwardBlocks = kStackedElements<P, T, Wider<P, T>> == 8 ? 4 : 5;
template <typename S, typename P, typename T>
constexpr int kBackwardBlocks = std::is_same_v<T, Nothing>       ? 5
                                : kStackedElements<S, P, T> == 8 ? 3
                                                                 : 4;

template <typename P, typename T>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<P, T>) stacked_forward(const StackedArgs args) {
  using S = Wider<P, T>;
  constexpr int E = kStackedElements<P, T, S>;
  const Tiling& tiling = args.tiling;
  const Place place = locate<E>(tiling, blockIdx.x);

  __shared__ Weights<E> weights;
  __shared__ Affine constants[kMostConstants];
  load_constants(args, constants);
#pragma unroll 1
  for (int round = 0; round < tiling.rounds; ++round) {
    Pack<P, E> pred[kUnroll][kVectors] = {};
    Pack<T, E> target[kUnroll][kVectors] = {};
    // Every load is issued before the first value is used.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Stretch s = place.stretch<E>(tiling, round, u);
      if (args.image[0] != nullptr) load_stretch(args, args.image[0], s, pred[u]);
      if (args.image[1] != nullptr) load_stretch(args, args.image[1], s, target[u]);
    }
    update_mask(args, place, round, weights);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Stretch s = place.stretch<E>(tiling, round, u);
      if (s.left <= 0) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float x[E];
        float y[E];
        float mask[E];
        unpack(pred[u][v], x);
        unpack(target[u][v], y);
        get_mask(args, weights, u, v, mask);
#pragma unroll 1
        for (int copy = 0; copy < args.copies; ++copy) {
          const Affine shared = segment_constants(args, constants, stacked_stretch(args, s, 0, copy));
          Affine affine[E];
#pragma unroll
          for (int k = 0; k < E; ++k) affine[k] = shared;
          if (by_element(args)) element_constants(args, constants, s, v, affine);
#pragma unroll 1
          for (int part = 0; part < args.parts; ++part) {
            float out[E] = {};
            add_share(args.part[part].share[0], x, mask, out);
            add_share(args.part[part].share[1], y, mask, out);
#pragma unroll
            for (int k = 0; k < E; ++k) out[k] = out[k] * affine[k].scale + affine[k].shift;
            const int64_t segment = stacked_stretch(args, s, part, copy).segment;
            S* to = static_cast<S*>(args.stacked) + segment * tiling.length + s.start + v * s.step;
            store_values(to, out, s.valid<E>(v), args.aligned);
          }
        }
      }
    }
  }
}

// S: the stacked batch; P, T: the gradients wanted, T Nothing if there is only one.
template <typename S, typename P, typename T>
__global__ void __launch_bounds__(kThreads, (kBackwardBlocks<S, P, T>))
    stacked_backward(const StackedArgs args) {
  constexpr bool kBoth = !std::is_same_v<T, Nothing>;
  constexpr int E = kStackedElements<S, P, T>;
  const Tiling& tiling = args.tiling;
  const Place place = locate<E>(tiling, blockIdx.x);

  __shared__ Weights<E> weights;
  __shared__ Affine constants[kMostConstants];
  load_constants(args, constants);
#pragma unroll 1
  for (int round = 0; round < tiling.rounds; ++round) {
    update_mask(args, place, round, weights);
    float sum[kBoth ? 2 : 1][kUnroll][kVectors][E] = {};
#pragma unroll 1
    for (int i = 0; i < args.parts * args.copies; ++i) {
      const PartShares& part = args.part[i / args.copies];
      Pack<S, E> packs[kUnroll][kVectors];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const Stretch s = place.stretch<E>(tiling, round, u);
        load_stretch(args, args.stacked, stacked_stretch(args, s, part.place, i % args.copies), packs[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const Stretch s = place.stretch<E>(tiling, round, u);
        if (s.left <= 0) continue;
        const Stretch stacked = stacked_stretch(args, s, 0, i % args.copies);
        // A scale of every element waits for the sum: no part changes it.
        const float scale = by_element(args) ? 1.0f : segment_constants(args, constants, stacked).scale;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          float grad[E];
          float mask[E];
          unpack(packs[u][v], grad);
          get_mask(args, weights, u, v, mask);
#pragma unroll
          for (int k = 0; k < E; ++k) grad[k] *= scale;
          add_share(part.share[0], grad, mask, sum[0][u][v]);
          if constexpr (kBoth) add_share(part.share[1], grad, mask, sum[1][u][v]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Stretch s = place.stretch<E>(tiling, round, u);
      if (s.left <= 0) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (by_element(args)) {
          Affine affine[E];
          element_constants(args, constants, s, v, affine);
#pragma unroll
          for (int k = 0; k < E; ++k) {
            sum[0][u][v][k] *= affine[k].scale;
            if constexpr (kBoth) sum[1][u][v][k] *= affine[k].scale;
          }
        }
        const int64_t offset = s.segment * tiling.length + s.start + v * s.step;
        const int valid = s.valid<E>(v);
        store_values(static_cast<P*>(args.gradient[0]) + offset, sum[0][u][v], valid, args.aligned);
        if constexpr (kBoth) {
          store_values(static_cast<T*>(args.gradient[1]) + offset, sum[1][u][v], valid, args.aligned);
        }
      }
    }
  }
}

}  // namespace ik::cuda
