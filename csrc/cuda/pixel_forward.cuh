// Forward kernel of the pixel losses: one streaming pass that leaves the sums of every tile; then one block
// adds these in double, in a fixed order, and writes losses and scales.
//
//   S_l = sum w penalty(input - target),  W_l = sum w,  over one layer, or one sample of it, and one region
//   loss = sum of scale_l S_l,  scale_l = weight_l / D_l with D_l = W_l, the number of elements, or 1
//
// Bytes per element of the input: 1 + 1/k elements, mask / C, 2 bits of signs when they are saved (l1).
#pragma once

#include "cuda/pixel.cuh"
#include "cuda/sums.cuh"

namespace ik::cuda {

// Blocks per multiprocessor: a cap of 96 registers.
constexpr int kForwardBlocks = 5;

// Sums of one tile, or of one sample, for R regions.
template <int R>
struct alignas(8 * R) Partial {
  float sum[R];
  float weight[R];
};

// Stores the sign words of a chunk; word[v] has element k of vector v at place k. Called by whole warps.
template <int E>
IK_DEVICE void store_signs(uint16_t* signs, const Tiling& tiling, const Chunk& s, int lane,
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

// Stores a block's sums; `swap`: the first region is the second of the result.
template <int R>
IK_DEVICE void store_partial(const float (&sum)[R], const float (&weight)[R], bool swap,
                             Partial<R>* partials) {
  float value[2 * R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    value[r] = sum[r];
    value[R + r] = weight[r];
  }
  sum_block<kThreads>(value);
  if (threadIdx.x != 0) return;
  Partial<R> partial;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    partial.sum[r] = swap ? value[R - 1 - r] : value[r];
    partial.weight[r] = swap ? value[2 * R - 1 - r] : value[R + r];
  }
  partials[blockIdx.x] = partial;
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

// Adds up one block's part of a layer and stores the signs of l1.
template <typename P, typename T, int R, bool kL1>
struct PixelForward {
  static constexpr int E = kElements<P, T>;

  const PixelLayer& layer;
  const Coord& coord;
  Weights<E>& weights;
  const PixelArgs& args;
  // Regions in the order (mask, 1 - mask).
  float sum[R] = {};
  float weight[R] = {};  // of the mask values read
  int chunks = 0;        // that a shared mask value counts for
  Pack<P, E> input[kUnroll][kVectors] = {};
  Pack<T, E> target[kUnroll][kVectors] = {};

  __device__ __forceinline__ void load_target(int round) {
    load_images(layer, layer.target, coord, round, 0, target);
  }

  __device__ __forceinline__ void load_input(int round, int prediction) {
    load_images(layer, layer.input, coord, round, prediction, input);
  }

  __device__ __forceinline__ void use_mask(const Chunk& chunk, int u) {
#pragma unroll
    for (int i = 0; i < kVectors * E; ++i) {
      const float w = weights.at(u, i / E, i % E);
      weight[0] += w;
      if constexpr (R == 2) weight[1] += i % E < chunk.valid<E>(i / E) ? 1.0f - w : 0.0f;
    }
  }

  __device__ __forceinline__ void use(const Chunk& chunk, int u, int mask_u) {
    uint32_t word[kVectors] = {};
    if (chunk.left > 0) {
      with_penalty<kL1>(args.penalty, [&](auto kind) { add<decltype(kind)::value>(chunk, u, mask_u, word); });
      ++chunks;
    }
    if constexpr (kL1) {
      if (layer.signs != nullptr) store_signs<E>(layer.signs, layer.tiling, chunk, coord.lane, word);
    }
  }

  template <Penalty kPenalty>
  __device__ __forceinline__ void add(const Chunk& chunk, int u, int mask_u, uint32_t (&word)[kVectors]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float x[E];
      float y[E];
      unpack(input[u][v], x);
      unpack(target[u][v], y);
#pragma unroll
      for (int k = 0; k < E; ++k) {
        const float w = weights.at(mask_u, v, k);
        float d = x[k] - y[k];
        // One region: d = 0 where nothing is counted, so that neither value nor sign sees a NaN there.
        if constexpr (R == 1) d = select_zero_(w, d);
        if constexpr (kL1) word[v] |= sign_bits(d) << k;
        float value = fast_penalty<kPenalty>(d, args.param);
        if constexpr (R == 1) {
          sum[0] += w * value;
        } else {
          // Only this penalty is not 0 beyond the segment's end, where 1 - mask is 1.
          if constexpr (kPenalty == Penalty::charbonnier) value = k < chunk.valid<E>(v) ? value : 0.0f;
          if (w != 0.0f) sum[0] += w * value;
          if (w != 1.0f) sum[1] += (1.0f - w) * value;
        }
      }
    }
  }
};

template <typename P, typename T, int R, bool kL1>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    pixel_forward(const IK_GRID_CONSTANT PixelArgs args) {
  constexpr int E = kElements<P, T>;
  const PixelLayer& layer = args.layer[find_job(args.layer, args.count)];
  const uint32_t block = blockIdx.x - layer.first_block;
  const Coord coord = locate<E>(layer.tiling, block);
  __shared__ Weights<E> weights;
  PixelForward<P, T, R, kL1> work{layer, coord, weights, args};
  for_chunks<E>(layer, coord, weights, work);
  if constexpr (kL1) {
    clear_spare_signs(layer.signs, layer.sign_words, layer.sign_words_allocated, block, layer.blocks);
  }
  // A mask value that was read once counts for all that share it.
  const int shared = layer.mask.shared ? work.chunks : layer.mask_per_prediction ? 1 : layer.predictions;
#pragma unroll
  for (int r = 0; r < R; ++r) work.weight[r] *= static_cast<float>(shared);
  store_partial<R>(work.sum, work.weight, R == 2 && !args.mask_is_hole,
                   static_cast<Partial<R>*>(args.partials));
}

// The partial sums of one layer: `tiles` of each sample, one after another.
struct FinalLayer {
  const void* partials;
  int64_t tiles;
  double weight;
  double numel;
};

struct FinalArgs {
  FinalLayer layer[kMaxLayers];
  float* loss[2];        // R scalars
  float* scale;          // [layers x samples, R]
  const double* before;  // loss of the layers of earlier launches, or null
  double* after;         // loss up to these layers, or null
  int64_t samples;       // 1 if there are several layers
  int64_t tiles;         // the most of a layer
  int32_t count;         // of layers
  Normalize normalize;
};

// The second stage, one block: scales and losses from the partial sums of all layers, in a fixed order.
template <int R>
__global__ void __launch_bounds__(kFinalThreads, 1)
    pixel_finalize(const IK_GRID_CONSTANT FinalArgs args, int lanes) {
  // Each sample of each layer has its own scale, or all samples of the only layer have one.
  const bool apart = args.samples == 1 || args.normalize == Normalize::sample;
  const auto samples = static_cast<double>(args.samples);
  double sum[R] = {};  // over this thread's samples, at lane 0 of each sample
  double weight[R] = {};
  double scaled[R] = {};  // sum of scale_n * S_n
  sum_samples<2 * R>(
      args.count * args.samples, args.tiles, lanes,
      [&](int64_t row, int64_t tile, double (&value)[2 * R]) {
        const FinalLayer& layer = args.layer[args.count == 1 ? 0 : row];
        if (tile >= layer.tiles) return;
        const int64_t first = args.count == 1 ? row * layer.tiles : 0;
        const Partial<R> partial = static_cast<const Partial<R>*>(layer.partials)[first + tile];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          value[r] += partial.sum[r];
          value[R + r] += partial.weight[r];
        }
      },
      [&](int64_t row, const double (&value)[2 * R]) {
        const FinalLayer& layer = args.layer[args.count == 1 ? 0 : row];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          sum[r] += value[r];
          weight[r] += value[R + r];
          if (!apart) continue;
          const double total = value[R + r];
          const double scale =
              layer.weight * sample_scale(args.normalize, total, total, layer.numel, samples);
          scaled[r] += scale * value[r];
          args.scale[row * R + r] = static_cast<float>(scale);
        }
      });
#pragma unroll
  for (int r = 0; r < R; ++r) {
    double loss = 0.0;
    if (apart) {
      loss = sum_block<kFinalThreads>(scaled[r]) + (args.before == nullptr ? 0.0 : *args.before);
    } else {
      loss = loss_of_one_scale<R>(args.normalize, sum[r], weight[r], args.layer[0].numel, args.samples,
                                  args.scale + r);
    }
    if (threadIdx.x != 0) continue;
    *args.loss[r] = static_cast<float>(loss);
    if (args.after != nullptr) *args.after = loss;
  }
}

}  // namespace ik::cuda
