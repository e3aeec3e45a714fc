// Forward kernels of the pixel losses: one streaming pass that leaves partial sums per tile (or the map), then one
// block that adds them in double, in a fixed order, and writes loss and scales.
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
  Penalty penalty;
  float param;
  bool mask_is_hole;
  bool aligned;  // pred, target and map allow whole vectors
};

// Stores the sign words of this thread's elements of one segment. word[v] holds the bits of vector v at the low
// places of a group. Called by all threads of a warp.
template <int E>
IK_DEVICE void store_signs(uint16_t* segment_signs, const Place& place, bool active, const uint32_t (&word)[kVectors]) {
  static_assert(kVectors == 2, "the exchange below pairs two vectors");
  uint16_t* tile = segment_signs + place.start / 8;
  if constexpr (E == 8) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (active && place.valid<E>(v) > 0) tile[v * place.lanes + place.lane] = static_cast<uint16_t>(word[v]);
    }
  } else {
    // Two neighbouring lanes share each group of 8: the even one completes and stores vector 0, the odd one
    // vector 1, so that all lanes store and one shuffle serves both.
    const int odd = place.lane & 1;
    const uint32_t give = odd ? word[0] : word[1];
    const uint32_t take = __shfl_xor_sync(0xffffffffu, give, 1);
    const uint32_t whole = odd ? (take | word[1] << 4) : (word[0] | take << 4);
    const int offset = (odd * place.lanes + (place.lane & ~1)) * E;
    if (active && offset < place.remaining) tile[offset / 8] = static_cast<uint16_t>(whole);
  }
}

template <int R>
IK_DEVICE void store_partial(const float (&sum)[R], const float (&weight)[R], Partial<R>* partials) {
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
    partial.sum[r] = value[r];
    partial.weight[r] = value[R + r];
  }
  partials[blockIdx.x] = partial;
}

template <typename P, typename T, Mode kMode, bool kL1>
__global__ void __launch_bounds__(kThreads) pixel_forward(const ForwardArgs args) {
  constexpr bool kMap = kMode == Mode::map;
  constexpr int R = kMode == Mode::two_regions ? 2 : 1;
  constexpr int E = kElements<P, T, kMap>;
  const Place place = locate<E>(args.tiling);
  const int64_t length = args.tiling.length;

  float weight[R][kVectors][E];
  float weight_sum[R] = {};
  float sum[R] = {};
  float total_weight[R] = {};
  for (int round = 0; round < place.rounds; ++round) {
    const int first = place.first + round * place.row_step;
    [[maybe_unused]] Pack<P, E> pred[kUnroll][kVectors];
    [[maybe_unused]] Pack<T, E> target[kUnroll][kVectors];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool active = first + u < place.last;
      const int64_t offset = (place.sample * args.tiling.segments + first + u) * length;
      load_values(static_cast<const P*>(args.pred) + offset, place, active, args.aligned, pred[u]);
      load_values(static_cast<const T*>(args.target) + offset, place, active, args.aligned, target[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool active = first + u < place.last;
      const int64_t segment = place.sample * args.tiling.segments + first + u;
      // After the loads of the images, so that waiting for the mask overlaps with them.
      if (!args.mask.shared ? active : (u == 0 && round == 0)) {
        load_weights<R, E>(args.mask, args.mask_is_hole, place, args.mask.shared ? 0 : first + u, weight);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          weight_sum[r] = 0.0f;
#pragma unroll
          for (int i = 0; i < kVectors * E; ++i) weight_sum[r] += weight[r][i / E][i % E];
        }
      }
      uint32_t word[kVectors] = {};
      if (active) {
        with_penalty<kL1>(args.penalty, [&](auto penalty) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            float x[E];
            float y[E];
            [[maybe_unused]] float out[E];
            unpack(pred[u][v], x);
            unpack(target[u][v], y);
#pragma unroll
            for (int k = 0; k < E; ++k) {
              float d = x[k] - y[k];
              // One region: d = 0 where nothing is counted, so neither value nor sign sees a NaN there.
              if constexpr (R == 1) d = select_zero_(weight[0][v][k], d);
              if constexpr (kL1) word[v] |= sign_bits(d) << k;
              const float value = penalty_value<decltype(penalty)::value>(d, args.param);
              if constexpr (kMap) {
                out[k] = weight[0][v][k] * value;
              } else if constexpr (R == 1) {
                sum[0] += weight[0][v][k] * value;
              } else {
#pragma unroll
                for (int r = 0; r < R; ++r) {
                  if (weight[r][v][k] != 0.0f) sum[r] += weight[r][v][k] * value;
                }
              }
            }
            if constexpr (kMap) {
              float* row = args.map + segment * length + place.start;
              store_values(row + place.offset<E>(v), out, place.valid<E>(v), args.aligned);
            }
          }
        });
#pragma unroll
        for (int r = 0; r < R; ++r) total_weight[r] += weight_sum[r];
      }
      if constexpr (kL1) {
        if (args.signs != nullptr) {
          store_signs<E>(args.signs + segment * args.tiling.groups, place, active, word);
        }
      }
    }
  }
  if constexpr (!kMap) store_partial<R>(sum, total_weight, static_cast<Partial<R>*>(args.partials));
}

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

// One block. `lanes` (power of two) threads add the tiles of one sample; 1024 / lanes samples at a time.
template <int R>
__global__ void __launch_bounds__(kFinalThreads) pixel_finalize(const FinalArgs args, int lanes) {
  const auto* partials = static_cast<const Partial<R>*>(args.partials);
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int at_once = kFinalThreads / lanes;
  const bool wide = lanes > kWarp;
  __shared__ double warp_sums[kFinalThreads / kWarp][2 * R];
  double sum[R] = {};     // over this thread's samples, at lane 0 of each sample
  double weight[R] = {};
  double scaled[R] = {};  // sum of scale_n * S_n
  for (int64_t first = 0; first < args.samples; first += at_once) {
    const int64_t sample = first + static_cast<int>(threadIdx.x) / lanes;
    double value[2 * R] = {};
    if (sample < args.samples) {
      const Partial<R>* row = partials + sample * args.tiles;
#pragma unroll 4
      for (int64_t tile = lane; tile < args.tiles; tile += lanes) {
        const Partial<R> partial = row[tile];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          value[r] += partial.sum[r];
          value[R + r] += partial.weight[r];
        }
      }
    }
    for (int step = (wide ? kWarp : lanes) / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < 2 * R; ++i) value[i] += __shfl_xor_sync(0xffffffffu, value[i], step);
    }
    if (wide) {
      __syncthreads();
      if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int i = 0; i < 2 * R; ++i) warp_sums[threadIdx.x / kWarp][i] = value[i];
      }
      __syncthreads();
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < 2 * R; ++i) {
          value[i] = 0.0;
          for (int w = 0; w < lanes / kWarp; ++w) value[i] += warp_sums[threadIdx.x / kWarp + w][i];
        }
      }
    }
    if (lane == 0 && sample < args.samples) {
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
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    double loss = 0.0;
    if (args.normalize == Normalize::sample) {
      loss = block_sum(scaled[r]);
    } else {
      const double weight_sum = block_sum(weight[r]);
      const double scale = sample_scale(args.normalize, 0.0, weight_sum, args.numel,
                                        static_cast<double>(args.samples));
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
