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
  const float* grad[2];   // scalars, one per region; null = the region contributes nothing
  const float* scale;     // [N, R], null for the map
  MapGrad map;
  const uint16_t* signs;  // [N, segments, groups], l1 only
  const void* pred;       // [N, segments, length], other penalties only
  const void* target;
  void* grad_pred;        // [N, segments, length] or null
  void* grad_target;
  Penalty penalty;
  float param;
  bool mask_is_hole;
  bool aligned;  // pred, target and both gradients allow whole vectors
};

// The sign words of this thread's vectors, shifted so that element k of a vector is place k.
template <int E>
IK_DEVICE void load_signs(const uint16_t* segment_signs, const Place& place, bool active, uint32_t (&word)[kVectors]) {
  const uint16_t* tile = segment_signs + place.start / 8;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    word[v] = 0;
    const int offset = place.offset<E>(v);
    if (active && offset < place.remaining) word[v] = static_cast<uint32_t>(tile[offset / 8]) >> (offset % 8);
  }
}

template <int E>
IK_DEVICE void load_map_grad(const MapGrad& map, int64_t sample, int segment, const Place& place, int v,
                             float (&values)[E]) {
  const float* data = map.data + sample * map.stride_n + segment * map.stride_c;
  const int64_t element = place.start + place.offset<E>(v);
  if (map.aligned) {
    if (place.valid<E>(v) > 0) {
      Pack<float, E> pack;
      load_pack(data + element, pack);
      unpack(pack, values);
    }
    return;
  }
  const int valid = place.valid<E>(v);
#pragma unroll
  for (int k = 0; k < E; ++k) values[k] = k < valid ? data[(element + k) * map.stride] : 0.0f;
}

// d loss / d (penalty of this thread's elements), up to the gradient of the map.
template <int R, int E>
IK_DEVICE void load_coefficients(const BackwardArgs& args, const Place& place, int segment,
                                 float (&coefficient)[kVectors][E]) {
  float weight[R][kVectors][E];
  float factor[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    factor[r] = 1.0f;
    if (args.scale != nullptr) {
      factor[r] = args.grad[r] == nullptr ? 0.0f : *args.grad[r] * args.scale[place.sample * R + r];
    }
  }
  load_weights<R, E>(args.mask, args.mask_is_hole, place, segment, weight);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int k = 0; k < E; ++k) {
      float total = 0.0f;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (weight[r][v][k] != 0.0f) total += factor[r] * weight[r][v][k];
      }
      coefficient[v][k] = total;
    }
  }
}

template <typename P, typename T, Mode kMode, bool kL1>
__global__ void __launch_bounds__(kThreads) pixel_backward(const BackwardArgs args) {
  constexpr bool kMap = kMode == Mode::map;
  constexpr int R = kMode == Mode::two_regions ? 2 : 1;
  constexpr int E = kElements<P, T, kMap>;
  const Place place = locate<E>(args.tiling);
  const int64_t length = args.tiling.length;

  float coefficient[kVectors][E];
  for (int round = 0; round < place.rounds; ++round) {
    const int first = place.first + round * place.row_step;
    [[maybe_unused]] uint32_t word[kUnroll][kVectors];
    [[maybe_unused]] Pack<P, E> pred[kUnroll][kVectors];
    [[maybe_unused]] Pack<T, E> target[kUnroll][kVectors];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool active = first + u < place.last;
      const int64_t segment = place.sample * args.tiling.segments + first + u;
      if constexpr (kL1) {
        load_signs<E>(args.signs + segment * args.tiling.groups, place, active, word[u]);
      } else {
        load_values(static_cast<const P*>(args.pred) + segment * length, place, active, args.aligned, pred[u]);
        load_values(static_cast<const T*>(args.target) + segment * length, place, active, args.aligned, target[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool active = first + u < place.last;
      const int64_t offset = (place.sample * args.tiling.segments + first + u) * length + place.start;
      if (!args.mask.shared ? active : (u == 0 && round == 0)) {
        load_coefficients<R, E>(args, place, args.mask.shared ? 0 : first + u, coefficient);
      }
      if (!active) continue;
      with_penalty<kL1>(args.penalty, [&](auto penalty) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          [[maybe_unused]] float upstream[E] = {};
          if constexpr (kMap) load_map_grad<E>(args.map, place.sample, first + u, place, v, upstream);
          [[maybe_unused]] float x[E];
          [[maybe_unused]] float y[E];
          if constexpr (!kL1) {
            unpack(pred[u][v], x);
            unpack(target[u][v], y);
          }
          float out[E];
#pragma unroll
          for (int k = 0; k < E; ++k) {
            float factor = coefficient[v][k];
            if constexpr (kMap) factor = select_zero_(factor, factor * upstream[k]);
            if constexpr (kL1) {
              out[k] = apply_sign(word[u][v], k, factor);
            } else {
              const float slope = penalty_grad<decltype(penalty)::value>(x[k] - y[k], args.param);
              out[k] = select_zero_(coefficient[v][k], factor * slope);
            }
          }
          const int valid = place.valid<E>(v);
          const int64_t element = offset + place.offset<E>(v);
          if (args.grad_pred != nullptr) {
            store_values(static_cast<P*>(args.grad_pred) + element, out, valid, args.aligned);
          }
          if (args.grad_target != nullptr) {
#pragma unroll
            for (int k = 0; k < E; ++k) out[k] = -out[k];
            store_values(static_cast<T*>(args.grad_target) + element, out, valid, args.aligned);
          }
        }
      });
    }
  }
}

}  // namespace ik::cuda
