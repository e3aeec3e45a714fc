// Forward kernels of the pixel losses: one streaming pass that leaves partial sums per tile (or the map),
// then one block that adds them in double, in a fixed order, and writes loss and scales.
//
// Bytes per element: pred + target + mask / C, 2 bits of signs when saved (l1), the fp32 map for "none".
#pragma once

#include "cuda/pixel.cuh"

namespace ik::cuda {

// Sums of one tile, or of one sample, for R regions.
template <int R>
struct alignas(8 * R) Partial {
  float sum[R];
  float weight[R];
};

struct ForwardArgs {
  Tiling tiling;
  MaskView mask;
  const void* pred;    // [N, segments, length]
  const void* target;  // [N, segments, length]
  void* partials;      // Partial<R> [N, tiles_per_sample], unused for the map
  float* map;          // [N, segments, length], the map only
  uint16_t* signs;     // [N, segments, groups] or null
  int64_t sign_words;  // in the groups, and in the whole tensor, which channels_last does not fill
  int64_t sign_words_allocated;
  Penalty penalty;
  float param;
  bool mask_is_hole;
  bool aligned;  // pred, target and map allow whole vectors
};

// Stores the sign words of a stretch; word[v] has element k of vector v at place k. Called by whole warps.
template <int E>
IK_DEVICE void store_signs(uint16_t* signs, const Tiling& tiling, const Stretch& s, int lane,
                           const uint32_t (&word)[kVectors]) {
  static_assert(kVectors == 2, "the exchange below pairs two vectors");
  uint16_t* data = signs + s.segment * tiling.groups;
  if constexpr (E == 8) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (s.valid<E>(v) > 0) data[(s.start + v * s.step) / 8] = static_cast<uint16_t>(word[v]);
    }
  } else {
    // Two neighbouring lanes share every group of 8. The even lane completes and stores vector 0, the odd one
    // vector 1: one shuffle serves both, and all lanes store.
    const bool odd = lane % 2 == 1;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? word[0] : word[1], 1);
    const uint32_t whole = odd ? (other | word[1] << 4) : (word[0] | other << 4);
    const int offset = odd ? s.step - E : 0;  // of the group's first element, from `start`
    if (s.left > offset) data[(s.start + offset) / 8] = static_cast<uint16_t>(whole);
  }
}

// No output byte stays unwritten: clears what channels_last does not need of the sign words of one tensor.
// Called by each of its `blocks` blocks.
IK_DEVICE void clear_spare_signs(uint16_t* signs, int64_t words, int64_t allocated, uint32_t block,
                                 uint32_t blocks) {
  if (signs == nullptr) return;
  int64_t i = words + static_cast<int64_t>(block) * kThreads + threadIdx.x;
  for (; i < allocated; i += static_cast<int64_t>(blocks) * kThreads) signs[i] = 0;
}

template <int R>
IK_DEVICE void store_partial(const float (&sum)[R], const float (&weight)[R], bool swap,
                             Partial<R>* partials) {
  __shared__ float warp_sums[kThreads / kWarp][2 * R];
  float value[2 * R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    value[r] = sum[r];
    value[R + r] = weight[r];
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) value[i] += __shfl_xor_sync(0xffffffffu, value[i], step);
  }
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) warp_sums[threadIdx.x / kWarp][i] = value[i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < 2 * R; ++i) {
    value[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) value[i] += warp_sums[w][i];
  }
  Partial<R> partial;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    partial.sum[r] = swap ? value[R - 1 - r] : value[r];
    partial.weight[r] = swap ? value[2 * R - 1 - r] : value[R + r];
  }
  partials[blockIdx.x] = partial;
}

// Adds the mask values of stretch u, and 1 - mask.
template <int R, int E>
IK_DEVICE void add_weights(const Weights<E>& weights, const Stretch& s, int u, float (&sum)[R]) {
#pragma unroll
  for (int i = 0; i < kVectors * E; ++i) {
    const float w = weights.at(u, i / E, i % E);
    sum[0] += w;
    if constexpr (R == 2) sum[1] += i % E < s.valid<E>(i / E) ? 1.0f - w : 0.0f;
  }
}

template <Penalty kPenalty>
IK_DEVICE float fast_penalty(float d, float param) {
#if defined(__CUDA_ARCH__)
  // One instruction, 1 ulp; the IEEE square root costs as much as all the rest.
  if constexpr (kPenalty == Penalty::charbonnier) {
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(d * d + param * param));
    return root;
  }
#endif
  return penalty_value<kPenalty>(d, param);
}

template <typename P, typename T, Mode kMode, bool kL1>
__global__ void __launch_bounds__(kThreads, kBlocks<kMode>) pixel_forward(const ForwardArgs args) {
  constexpr int R = kRegions<kMode>;
  constexpr int E = kElements<P, T, kMode>;
  const Tiling& tiling = args.tiling;
  const Place place = locate<E>(tiling, blockIdx.x);

  __shared__ Weights<E> weights;
  // Regions in the order (mask, 1 - mask) until the end.
  float weight[R] = {};  // of the mask values read
  int stretches = 0;     // that a shared mask value counts for
  float sum[R] = {};
  for (int round = 0; round < tiling.rounds; ++round) {
    Pack<P, E> pred[kUnroll][kVectors];
    Pack<T, E> target[kUnroll][kVectors];
    if (args.aligned) {
      load_round<true>(args.pred, args.target, tiling, place, round, pred, target);
    } else {
      load_round<false>(args.pred, args.target, tiling, place, round, pred, target);
    }
    // After the loads of the images: waiting for the mask overlaps with them.
    if (round == 0 || !args.mask.shared) {
#pragma unroll 1
      for (int u = 0; u < (args.mask.shared ? 1 : kUnroll); ++u) {
        const Stretch s = place.stretch<E>(tiling, round, u);
        load_mask(args.mask, s, u, weights);
        if constexpr (kMode != Mode::map) add_weights<R>(weights, s, u, weight);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const Stretch s = place.stretch<E>(tiling, round, u);
      const int mask_u = args.mask.shared ? 0 : u;
      uint32_t word[kVectors] = {};
      if (s.left > 0) {
        with_penalty<kL1>(args.penalty, [&](auto penalty) {
          constexpr Penalty kPenalty = decltype(penalty)::value;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            float x[E];
            float y[E];
            [[maybe_unused]] float out[E];
            unpack(pred[u][v], x);
            unpack(target[u][v], y);
#pragma unroll
            for (int k = 0; k < E; ++k) {
              const float w = weights.at(mask_u, v, k);
              float d = x[k] - y[k];
              // One region: d = 0 where nothing is counted, so neither value nor sign sees a NaN there.
              if constexpr (R == 1) d = select_zero_(w, d);
              if constexpr (kL1) word[v] |= sign_bits(d) << k;
              float value = fast_penalty<kPenalty>(d, args.param);
              if constexpr (kMode == Mode::map) {
                out[k] = w * value;
              } else if constexpr (R == 1) {
                sum[0] += w * value;
              } else {
                // Only this penalty is not 0 beyond the segment's end, where 1 - mask is 1.
                if constexpr (kPenalty == Penalty::charbonnier) value = k < s.valid<E>(v) ? value : 0.0f;
                if (w != 0.0f) sum[0] += w * value;
                if (w != 1.0f) sum[1] += (1.0f - w) * value;
              }
            }
            if constexpr (kMode == Mode::map) {
              float* map = args.map + s.segment * tiling.length + s.start + v * s.step;
              store_values(map, out, s.valid<E>(v), args.aligned);
            }
          }
        });
        ++stretches;
      }
      if constexpr (kL1) {
        if (args.signs != nullptr) store_signs<E>(args.signs, tiling, s, place.lane, word);
      }
    }
  }
  if constexpr (kL1)
    clear_spare_signs(args.signs, args.sign_words, args.sign_words_allocated, blockIdx.x, gridDim.x);
  if constexpr (kMode != Mode::map) {
#pragma unroll
    for (int r = 0; r < R; ++r) weight[r] *= args.mask.shared ? static_cast<float>(stretches) : 1.0f;
    store_partial<R>(sum, weight, R == 2 && !args.mask_is_hole, static_cast<Partial<R>*>(args.partials));
  }
}

constexpr int kFinalThreads = 1024;

struct FinalArgs {
  const void* partials;  // Partial<R> [samples, tiles]
  float* loss[2];        // R scalars
  float* scale;          // [samples, R]
  int64_t samples;
  int64_t tiles;  // per sample
  double numel;
  Normalize normalize;
};

// Adds `value` over all threads in a fixed order; every thread gets the result.
IK_DEVICE double block_sum(double value) {
  __shared__ double warp_sums[kFinalThreads / kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = warp_sums[threadIdx.x % kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Adds up what the tiles of every sample left, in a fixed order; for one block. `lanes` (power of two)
// threads work on a sample, 1024 / lanes samples at a time. `add(tile, value)` adds a tile, counted over all
// samples; `use(sample, value)` is called by the first lane of a sample, which gets its sums.
template <int kValues, typename Add, typename Use>
IK_DEVICE void sum_samples(int64_t samples, int64_t tiles, int lanes, const Add& add, const Use& use) {
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int at_once = kFinalThreads / lanes;
  const bool wide = lanes > kWarp;
  __shared__ double warp_sums[kFinalThreads / kWarp][kValues];
  // Tiles loaded at once: 1024 threads have 64 registers each.
  [[maybe_unused]] constexpr int kAhead = kValues > 4 ? 2 : 4;
  for (int64_t first = 0; first < samples; first += at_once) {
    const int64_t sample = first + static_cast<int>(threadIdx.x) / lanes;
    double value[kValues] = {};
    if (sample < samples) {
#pragma unroll kAhead
      for (int64_t tile = lane; tile < tiles; tile += lanes) add(sample * tiles + tile, value);
    }
    for (int step = (wide ? kWarp : lanes) / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) value[i] += __shfl_xor_sync(0xffffffffu, value[i], step);
    }
    if (wide) {
      __syncthreads();
      if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) warp_sums[threadIdx.x / kWarp][i] = value[i];
      }
      __syncthreads();
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
          value[i] = 0.0;
          for (int w = 0; w < lanes / kWarp; ++w) value[i] += warp_sums[threadIdx.x / kWarp + w][i];
        }
      }
    }
    if (lane == 0 && sample < samples) use(sample, value);
  }
}

// One block.
template <int R>
__global__ void __launch_bounds__(kFinalThreads, 1) pixel_finalize(const FinalArgs args, int lanes) {
  const auto* partials = static_cast<const Partial<R>*>(args.partials);
  double sum[R] = {};  // over this thread's samples, at lane 0 of each sample
  double weight[R] = {};
  double scaled[R] = {};  // sum of scale_n * S_n
  sum_samples<2 * R>(
      args.samples, args.tiles, lanes,
      [&](int64_t tile, double (&value)[2 * R]) {
        const Partial<R> partial = partials[tile];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          value[r] += partial.sum[r];
          value[R + r] += partial.weight[r];
        }
      },
      [&](int64_t sample, const double (&value)[2 * R]) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          sum[r] += value[r];
          weight[r] += value[R + r];
          if (args.normalize == Normalize::sample) {
            const double scale = sample_scale(args.normalize, value[R + r], 0.0, args.numel,
                                              static_cast<double>(args.samples));
            scaled[r] += scale * value[r];
            args.scale[sample * R + r] = static_cast<float>(scale);
          }
        }
      });
#pragma unroll
  for (int r = 0; r < R; ++r) {
    double loss = 0.0;
    if (args.normalize == Normalize::sample) {
      loss = block_sum(scaled[r]);
    } else {
      const double weight_sum = block_sum(weight[r]);
      const double scale =
          sample_scale(args.normalize, 0.0, weight_sum, args.numel, static_cast<double>(args.samples));
      loss = block_sum(sum[r]) * scale;
      for (int64_t n = threadIdx.x; n < args.samples; n += kFinalThreads) {
        args.scale[n * R + r] = static_cast<float>(scale);
      }
    }
    if (threadIdx.x == 0) *args.loss[r] = static_cast<float>(loss);
  }
}

static inline int finalize_lanes(int64_t samples, int64_t tiles) {
  int lanes = 1;
  while (lanes < tiles && lanes < kFinalThreads && lanes * 2 * samples <= kFinalThreads) lanes *= 2;
  return lanes;
}

}  // namespace ik::cuda
