// Kernels of feature_distance: all layers in one launch, every target value read once for the k predictions.
//
//   S_l = sum w penalty(input - target[n mod N]), W_l = sum w; scale_l = weight_l / W_l, loss = sum scale_l
//   S_l d loss / d input = grad scale_l w penalty'(d)
//
// Tiles, vectors, weights and signs are those of the pixel losses (pixel.cuh), cut over the N target samples:
// a thread loads its target vectors, then goes over the predictions. Blocks of all layers form one grid. The
// second stage is one block that adds the partial sums of all layers in double, in a fixed order.
//
// Bytes per input element: forward 1 + 1/k elements, mask / C, 2 bits of signs (l1); backward 2 bits (l1) or
// 1 + 1/k elements, mask / C, and the gradient.
#pragma once

#include "cuda/tensor_core.cuh"
#include "cuda/pixel_backward.cuh"
#include "cuda/pixel_forward.cuh"

namespace ik::cuda {

constexpr int kMaxLayers = 8;
// Blocks per multiprocessor: caps of 96 and 128 registers.
constexpr int kForwardBlocks = 5;
template <bool kL1>
constexpr int kBackwardBlocks = kL1 ? 5 : 4;

struct FeatureLayer {
  Tiling tiling;  // over the target's samples
  MaskView mask;
  const void* input;   // [k N, segments, length]
  const void* target;  // [N, segments, length]
  uint16_t* signs;     // [k N, segments, groups] or null
  int64_t sign_words;  // in the groups, and in the whole tensor
  int64_t sign_words_allocated;
  void* grad_input;        // [k N, segments, length], backward only
  int64_t batch_segments;  // of N samples
  int32_t batch;           // N
  int32_t predictions;     // k
  int32_t scale_index;     // backward only
  uint32_t first_block;
  uint32_t blocks;
  bool mask_per_prediction;  // k N masks
  bool aligned;              // input, target and gradient allow whole vectors
};

struct FeatureArgs {
  FeatureLayer layer[kMaxLayers];
  void* partials;      // Partial<1> of every block, forward only
  const float* grad;   // scalar, backward only
  const float* scale;  // [layers], backward only
  Penalty penalty;
  float param;
  int32_t count;
};

IK_DEVICE const FeatureLayer& find_layer(const FeatureArgs& args) {
  int i = 0;
  while (i + 1 < args.count && blockIdx.x >= args.layer[i + 1].first_block) ++i;
  return args.layer[i];
}

// The stretch of prediction `prediction` that belongs to a stretch of the target.
template <int E>
IK_DEVICE Stretch input_stretch(const FeatureLayer& layer, const Place& place, int round, int u,
                                int prediction) {
  Stretch s = place.stretch<E>(layer.tiling, round, u);
  s.segment += prediction * layer.batch_segments;
  return s;
}

template <typename T, int E>
IK_DEVICE void load_images(const FeatureLayer& layer, const void* images, const Place& place, int round,
                           int prediction, Pack<T, E> (&packs)[kUnroll][kVectors]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Stretch s = input_stretch<E>(layer, place, round, u, prediction);
    if (layer.aligned) {
      load_values<true>(images, layer.tiling, s, packs[u]);
    } else {
      load_values<false>(images, layer.tiling, s, packs[u]);
    }
  }
}

// Brings the weights up to date, each mask value as rarely as the mask's shape allows; true if it read some.
template <int E, typename Use>
IK_DEVICE void update_weights(const FeatureLayer& layer, const Place& place, int round, int prediction,
                              Weights<E>& weights, const Use& use) {
  const MaskView& mask = layer.mask;
  const bool first = prediction == 0 && (round == 0 || !mask.shared);
  if (!first && !layer.mask_per_prediction) return;
#pragma unroll 1
  for (int u = 0; u < (mask.shared ? 1 : kUnroll); ++u) {
    Stretch s = input_stretch<E>(layer, place, round, u, prediction);
    if (layer.mask_per_prediction) s.sample += static_cast<int64_t>(prediction) * layer.batch;
    load_mask(mask, s, u, weights);
    use(s, u);
  }
}

template <typename T, bool kL1>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    feature_forward(const IK_GRID_CONSTANT FeatureArgs args) {
  constexpr int E = 16 / static_cast<int>(sizeof(T));
  const FeatureLayer& layer = find_layer(args);
  const Place place = locate<E>(layer.tiling, blockIdx.x - layer.first_block);
  __shared__ Weights<E> weights;
  float weight[1] = {};  // of the mask values read
  int stretches = 0;     // that a shared mask value counts for
  float sum[1] = {};
#pragma unroll 1
  for (int round = 0; round < layer.tiling.rounds; ++round) {
    Pack<T, E> target[kUnroll][kVectors];
    load_images(layer, layer.target, place, round, 0, target);
#pragma unroll 1
    for (int prediction = 0; prediction < layer.predictions; ++prediction) {
      Pack<T, E> input[kUnroll][kVectors];
      load_images(layer, layer.input, place, round, prediction, input);
      update_weights<E>(layer, place, round, prediction, weights,
                        [&](const Stretch& s, int u) { add_weights<1>(weights, s, u, weight); });
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const Stretch s = input_stretch<E>(layer, place, round, u, prediction);
        const int mask_u = layer.mask.shared ? 0 : u;
        uint32_t word[kVectors] = {};
        if (s.left > 0) {
          with_penalty<kL1>(args.penalty, [&](auto penalty) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
              float x[E];
              float y[E];
              unpack(input[u][v], x);
              unpack(target[u][v], y);
#pragma unroll
              for (int k = 0; k < E; ++k) {
                const float w = weights.at(mask_u, v, k);
                // 0 where nothing is counted, so neither value nor sign sees a NaN there.
                const float d = select_zero_(w, x[k] - y[k]);
                if constexpr (kL1) word[v] |= sign_bits(d) << k;
                sum[0] += w * fast_penalty<decltype(penalty)::value>(d, args.param);
              }
            }
          });
          ++stretches;
        }
        if constexpr (kL1) {
          if (layer.signs != nullptr) store_signs<E>(layer.signs, layer.tiling, s, place.lane, word);
        }
      }
    }
  }
  if constexpr (kL1) {
    clear_spare_signs(layer.signs, layer.sign_words, layer.sign_words_allocated,
                      blockIdx.x - layer.first_block, layer.blocks);
  }
  // A value that was read once counted for all it is shared by.
  if (layer.mask.shared) {
    weight[0] *= static_cast<float>(stretches);
  } else if (!layer.mask_per_prediction) {
    weight[0] *= static_cast<float>(layer.predictions);
  }
  store_partial<1>(sum, weight, false, static_cast<Partial<1>*>(args.partials));
}

template <typename T, typename Out, bool kL1>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<kL1>)
    feature_backward(const IK_GRID_CONSTANT FeatureArgs args) {
  constexpr int E = 16 / static_cast<int>(sizeof(T));
  const FeatureLayer& layer = find_layer(args);
  const Place place = locate<E>(layer.tiling, blockIdx.x - layer.first_block);
  __shared__ Weights<E> weights;
  const float factor[2] = {*args.grad * args.scale[layer.scale_index], 0.0f};
#pragma unroll 1
  for (int round = 0; round < layer.tiling.rounds; ++round) {
    [[maybe_unused]] Pack<T, E> target[kUnroll][kVectors];
    if constexpr (!kL1) load_images(layer, layer.target, place, round, 0, target);
#pragma unroll 1
    for (int prediction = 0; prediction < layer.predictions; ++prediction) {
      [[maybe_unused]] Pack<T, E> input[kUnroll][kVectors];
      [[maybe_unused]] uint32_t word[kUnroll][kVectors];
      if constexpr (kL1) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          load_signs<E>(layer.signs, layer.tiling, input_stretch<E>(layer, place, round, u, prediction),
                        word[u]);
        }
      } else {
        load_images(layer, layer.input, place, round, prediction, input);
      }
      update_weights<E>(layer, place, round, prediction, weights, [&](const Stretch&, int u) {
        weights_to_coefficients<Mode::one_region>(factor, u, weights);
      });
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const Stretch s = input_stretch<E>(layer, place, round, u, prediction);
        const int mask_u = layer.mask.shared ? 0 : u;
        if (s.left <= 0) continue;
        with_penalty<kL1>(args.penalty, [&](auto penalty) {
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
                const float slope = fast_penalty_grad<decltype(penalty)::value>(x[k] - y[k], args.param);
                out[k] = select_zero_(coefficient, coefficient * slope);
              }
            }
            const int64_t offset = s.segment * layer.tiling.length + s.start + v * s.step;
            store_values(static_cast<Out*>(layer.grad_input) + offset, out, s.valid<E>(v), layer.aligned);
          }
        });
      }
    }
  }
}

constexpr int kTotalLanes = kFinalThreads / kMaxLayers;  // that add one layer

struct FeatureTotalLayer {
  const void* partials;  // Partial<1>, `blocks` of them
  int64_t blocks;
  double weight;
  double numel;  // of the input
};

struct FeatureTotalArgs {
  FeatureTotalLayer layer[kMaxLayers];
  float* loss;
  float* scale;          // of these layers
  const double* before;  // loss of the layers of earlier launches, or null
  double* after;         // loss up to these layers
  int32_t count;
  Normalize normalize;
};

// One block; 128 threads for each layer.
static __global__ void __launch_bounds__(kFinalThreads)
    feature_total(const IK_GRID_CONSTANT FeatureTotalArgs args) {
  const int index = static_cast<int>(threadIdx.x) / kTotalLanes;
  __shared__ double warp_sums[kFinalThreads / kWarp][2];
  double value[2] = {};
  if (index < args.count) {
    const auto* partials = static_cast<const Partial<1>*>(args.layer[index].partials);
#pragma unroll 4
    for (int64_t i = threadIdx.x % kTotalLanes; i < args.layer[index].blocks; i += kTotalLanes) {
      const Partial<1> partial = partials[i];
      value[0] += partial.sum[0];
      value[1] += partial.weight[0];
    }
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) value[i] += __shfl_xor_sync(0xffffffffu, value[i], step);
  }
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) warp_sums[threadIdx.x / kWarp][i] = value[i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double loss = args.before == nullptr ? 0.0 : *args.before;
  for (int layer = 0; layer < args.count; ++layer) {
    double sum = 0.0;
    double weight = 0.0;
    for (int w = 0; w < kTotalLanes / kWarp; ++w) {
      sum += warp_sums[layer * (kTotalLanes / kWarp) + w][0];
      weight += warp_sums[layer * (kTotalLanes / kWarp) + w][1];
    }
    const FeatureTotalLayer& current = args.layer[layer];
    const double scale = current.weight * sample_scale(args.normalize, 0.0, weight, current.numel, 1.0);
    loss += scale * sum;
    args.scale[layer] = static_cast<float>(scale);
  }
  *args.after = loss;
  *args.loss = static_cast<float>(loss);
}

}  // namespace ik::cuda
