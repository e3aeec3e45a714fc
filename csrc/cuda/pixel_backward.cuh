// Backward kernel of the pixel losses: the gradients of input and target in one pass.
//
//   d loss / d input = (sum over regions of grad scale w) penalty'(input - target), d / d target = minus that
//
// l1 reads 2 bits an element and the mask; the other penalties read input and target again. Bytes per element
// of the input: 1/4 (l1) or 1 + 1/k elements, mask / C, and every gradient that is asked for.
#pragma once

#include "cuda/pixel.cuh"

namespace ik::cuda {

// Blocks per multiprocessor: caps of 96 and 128 registers.
template <bool kL1>
constexpr int kBackwardBlocks = kL1 ? 5 : 4;

// The sign words of a chunk, shifted so that element k of a vector is place k.
template <int E>
IK_DEVICE void load_signs(const uint16_t* signs, const Tiling& tiling, const Chunk& s,
                          uint32_t (&word)[kVectors]) {
  const uint16_t* data = signs + s.segment * tiling.groups;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t element = s.start + v * s.step;
    word[v] = 0;
    if (s.valid<E>(v) > 0) word[v] = static_cast<uint32_t>(data[element / 8]) >> (element % 8);
  }
}

template <Penalty kPenalty>
IK_DEVICE float fast_penalty_grad(float d, float param) {
#if defined(__CUDA_ARCH__)
  // 2 ulp in two instructions; IEEE division and square root would cost several times the rest of the kernel.
  if constexpr (kPenalty == Penalty::charbonnier) return d * rsqrtf(d * d + param * param);
#endif
  return penalty_grad<kPenalty>(d, param);
}

// The gradients of one block's part of a layer.
template <typename P, typename T, int R, bool kL1>
struct PixelBackward {
  static constexpr int E = kElements<P, T>;

  const PixelLayer& layer;
  const Coord& coord;
  Weights<E>& weights;
  const PixelArgs& args;
  float factor[R] = {};  // of mask and 1 - mask
  uint32_t word[kUnroll][kVectors] = {};
  Pack<P, E> input[kUnroll][kVectors] = {};
  Pack<T, E> target[kUnroll][kVectors] = {};

  __device__ __forceinline__ void load_target(int round) {
    if constexpr (!kL1) load_images(layer, layer.target, coord, round, 0, target);
  }

  __device__ __forceinline__ void load_input(int round, int prediction) {
    if constexpr (kL1) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        load_signs<E>(layer.signs, layer.tiling, input_chunk<E>(layer, coord, round, u, prediction), word[u]);
      }
    } else {
      load_images(layer, layer.input, coord, round, prediction, input);
    }
  }

  // Replaces the mask values by d loss / d penalty.
  __device__ __forceinline__ void use_mask(const Chunk&, int u) {
#pragma unroll
    for (int i = 0; i < kVectors * E; ++i) {
      float& w = weights.at(u, i / E, i % E);
      float total = w == 0.0f ? 0.0f : factor[0] * w;
      if constexpr (R == 2) total += w == 1.0f ? 0.0f : factor[1] * (1.0f - w);
      w = total;
    }
  }

  __device__ __forceinline__ void use(const Chunk& chunk, int u, int mask_u) {
    if (chunk.left <= 0) return;
    with_penalty<kL1>(args.penalty, [&](auto kind) { store<decltype(kind)::value>(chunk, u, mask_u); });
  }

  template <Penalty kPenalty>
  __device__ __forceinline__ void store(const Chunk& chunk, int u, int mask_u) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float out[E];
      [[maybe_unused]] float x[E];
      [[maybe_unused]] float y[E];
      if constexpr (!kL1) {
        unpack(input[u][v], x);
        unpack(target[u][v], y);
      }
#pragma unroll
      for (int k = 0; k < E; ++k) {
        const float coefficient = weights.at(mask_u, v, k);
        if constexpr (kL1) {
          out[k] = apply_sign(word[u][v], k, coefficient);
        } else {
          const float slope = fast_penalty_grad<kPenalty>(x[k] - y[k], args.param);
          out[k] = select_zero_(coefficient, coefficient * slope);
        }
      }
      const int valid = chunk.valid<E>(v);
      const int64_t offset = chunk.segment * layer.tiling.length + chunk.start + v * chunk.step;
      if (layer.grad_input != nullptr) {
        store_values(static_cast<P*>(layer.grad_input) + offset, out, valid, layer.aligned);
      }
      if (layer.grad_target != nullptr) {
#pragma unroll
        for (int k = 0; k < E; ++k) out[k] = -out[k];
        store_values(static_cast<T*>(layer.grad_target) + offset, out, valid, layer.aligned);
      }
    }
  }
};

template <typename P, typename T, int R, bool kL1>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<kL1>)
    pixel_backward(const IK_GRID_CONSTANT PixelArgs args) {
  constexpr int E = kElements<P, T>;
  const PixelLayer& layer = args.layer[find_job(args.layer, args.count)];
  const Coord coord = locate<E>(layer.tiling, blockIdx.x - layer.first_block);
  __shared__ Weights<E> weights;
  PixelBackward<P, T, R, kL1> work{layer, coord, weights, args};
  const int64_t row = layer.scale_row + (args.per_sample ? coord.sample : 0);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int region = R == 2 && !args.mask_is_hole ? 1 - r : r;  // (mask, 1 - mask) to (hole, valid)
    const float* grad = args.grad[region];
    work.factor[r] = grad == nullptr ? 0.0f : *grad * args.scale[row * R + region];
  }
  for_chunks<E>(layer, coord, weights, work);
}

}  // namespace ik::cuda
