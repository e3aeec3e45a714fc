// Backward kernel of the pixel losses: both gradients in one pass.
//
// l1 reads 2 bits an element and the mask; the other penalties read pred and target again. Bytes per element:
// 1/4 (or pred + target) + mask / C + one store per requested gradient.
#pragma once

#include "cuda/pixel.cuh"

namespace ik::cuda {

// Gradient of the map (reduction "none"): element i of segment (n, c) is
// data[n * stride_n + c * stride_c + i * stride]; stride 0 is an expanded gradient.
struct MapGrad {
  const float* data;  // null for the reductions to a scalar
  int64_t stride_n;
  int64_t stride_c;
  int64_t stride;
  bool aligned;  // stride 1 and whole vectors
};

struct BackwardArgs {
  Tiling tiling;
  MaskView mask;
  const float* grad[2];  // scalars, one per region; null = the region contributes nothing
  const float* scale;    // [N, R], null for the map
  MapGrad map;
  const uint16_t* signs;  // [N, segments, groups], l1 only
  const void* pred;       // [N, segments, length], other penalties only
  const void* target;
  void* grad_pred;  // [N, segments, length] or null
  void* grad_target;
  Penalty penalty;
  float param;
  bool mask_is_hole;
  bool aligned;  // pred, target and both gradients allow whole vectors
};

// The sign words of a stretch, shifted so that element k of a vector is place k.
template <int E>
IK_DEVICE void load_signs(const uint16_t* signs, const Tiling& tiling, const Stretch& s,
                          uint32_t (&word)[kVectors]) {
  const uint16_t* data = signs + s.segment * tiling.groups;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t element = s.start + v * s.step;
    word[v] = 0;
    if (s.valid<E>(v) > 0) word[v] = static_cast<uint32_t>(data[element / 8]) >> (element % 8);
  }
}

template <int E>
IK_DEVICE void load_map_grad(const MapGrad& map, const Stretch& s, int v, float (&values)[E]) {
  const float* data = map.data + s.sample * map.stride_n + s.channel * map.stride_c;
  const int64_t element = s.start + v * s.step;
  const int valid = s.valid<E>(v);
  if (map.aligned) {
    Pack<float, E> pack;
    load_pack_if(valid > 0, data + element, pack);
    unpack(pack, values);
  } else {
#pragma unroll
    for (int k = 0; k < E; ++k) values[k] = k < valid ? data[(element + k) * map.stride] : 0.0f;
  }
}

// Replaces the mask values of stretch u by d loss / d penalty; `factor` belongs to mask and 1 - mask.
template <Mode kMode, int E>
IK_DEVICE void weights_to_coefficients(const float (&factor)[2], int u, Weights<E>& weights) {
#pragma unroll
  for (int i = 0; i < kVectors * E; ++i) {
    float& w = weights.at(u, i / E, i % E);
    float total = w == 0.0f ? 0.0f : factor[0] * w;
    if constexpr (kMode == Mode::two_regions) total += w == 1.0f ? 0.0f : factor[1] * (1.0f - w);
    w = total;
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

template <typename P, typename T, Mode kMode, bool kL1>
__global__ void __launch_bounds__(kThreads, kBlocks<kMode>) pixel_backward(const BackwardArgs args) {
  constexpr int E = kElements<P, T, kMode>;
  const Tiling& tiling = args.tiling;
  const Place place = locate<E>(tiling, blockIdx.x);

  __shared__ Weights<E> weights;
  float factor[2] = {1.0f, 0.0f};
  if constexpr (kMode != Mode::map) {
    constexpr int R = kRegions<kMode>;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int region = R == 2 && !args.mask_is_hole ? 1 - r : r;  // (mask, 1 - mask) to (hole, valid)
      const float* grad = args.grad[region];
      factor[r] =
          grad == nullptr ? 0.0f : *grad * args.scale[static_cast<int64_t>(place.sample) * R + region];
    }
  }
  for (int round = 0; round < tiling.rounds; ++round) {
    [[maybe_unused]] uint32_t word[kUnroll][kVectors];
    [[maybe_unused]] Pack<P, E> pred[kUnroll][kVectors];
    [[maybe_unused]] Pack<T, E> target[kUnroll][kVectors];
    if constexpr (kL1) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        load_signs<E>(args.signs, tiling, place.stretch<E>(tiling, round, u), word[u]);
      }
    } else if (args.aligned) {
      load_round<true>(args.pred, args.target, tiling, place, round, pred, target);
    } else {
      load_round<false>(args.pred, args.target, tiling, place, round, pred, target);
    }
    if (round == 0 || !args.mask.shared) {
#pragma unroll 1
      for (int u = 0; u < (args.mask.shared ? 1 : kUnroll); ++u) {
        load_mask(args.mask, place.stretch<E>(tiling, round, u), u, weights);
        if constexpr (kMode != Mode::map) weights_to_coefficients<kMode>(factor, u, weights);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Stretch s = place.stretch<E>(tiling, round, u);
      const int mask_u = args.mask.shared ? 0 : u;
      if (s.left <= 0) continue;
      with_penalty<kL1>(args.penalty, [&](auto penalty) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          float out[E];
          [[maybe_unused]] float upstream[E];
          [[maybe_unused]] float x[E];
          [[maybe_unused]] float y[E];
          if constexpr (kMode == Mode::map) load_map_grad<E>(args.map, s, v, upstream);
          if constexpr (!kL1) {
            unpack(pred[u][v], x);
            unpack(target[u][v], y);
          }
#pragma unroll
          for (int k = 0; k < E; ++k) {
            const float weight = weights.at(mask_u, v, k);
            float coefficient = weight;
            if constexpr (kMode == Mode::map) coefficient = select_zero_(weight, weight * upstream[k]);
            if constexpr (kL1) {
              out[k] = apply_sign(word[u][v], k, coefficient);
            } else {
              const float slope = fast_penalty_grad<decltype(penalty)::value>(x[k] - y[k], args.param);
              out[k] = select_zero_(weight, coefficient * slope);
            }
          }
          const int valid = s.valid<E>(v);
          const int64_t offset = s.segment * tiling.length + s.start + v * s.step;
          if (args.grad_pred != nullptr) {
            store_values(static_cast<P*>(args.grad_pred) + offset, out, valid, args.aligned);
          }
          if (args.grad_target != nullptr) {
#pragma unroll
            for (int k = 0; k < E; ++k) out[k] = -out[k];
            store_values(static_cast<T*>(args.grad_target) + offset, out, valid, args.aligned);
          }
        }
      });
    }
  }
}

}  // namespace ik::cuda
