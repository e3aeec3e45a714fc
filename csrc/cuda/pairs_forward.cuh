// Forward kernels over neighbouring pixels: one pass over the images that leaves the sums of every block and
// the signs, then one block that adds the sums in double, in a fixed order, and writes losses and scales.
//
// Bytes per element, fp32 images and mask [N, 1, H, W]: 8 + 4/C, 3/4 of signs (total variation 4, or 8 + 4/C
// of a composite, and 1/2).
#pragma once

#include "cuda/pairs_image.cuh"
#include "cuda/pixel_forward.cuh"

namespace ik::cuda {

enum Sum : int { kHole, kValid, kHoleWeight, kValidWeight, kDown, kAcross, kRegion, kSums };

struct alignas(16) PairPartial {
  float sum[kSums + 1];
};

struct PairForwardArgs {
  Frame frame;
  MaskPlanes mask;
  Image<const void> pred;    // [N, C, H, W]
  Image<const void> target;  // [N, C, H, W], unless Terms::image
  PairPartial* partials;     // [N, blocks]
  uint32_t* signs;           // [N, C, ceil(H / 4), kinds, ceil(W / 4)] or null
};

template <bool kSquare>
IK_DEVICE float pair_penalty(float d) {
  return kSquare ? d * d : fabsf(d);
}

// Adds up a block's sums, in a fixed order.
IK_DEVICE void store_sums(float (&sum)[kSums], PairPartial* partials) {
  __shared__ float warp_sums[kThreads / kWarp][kSums];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
  }
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) warp_sums[threadIdx.x / kWarp][i] = sum[i];
  }
  __syncthreads();
  if (threadIdx.x >= kSums) return;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) total += warp_sums[w][threadIdx.x];
  partials[blockIdx.x].sum[threadIdx.x] = total;
}

template <Terms kTerms, int kChannels, bool kSquare>
__global__ void __launch_bounds__(kThreads, 4) pairs_forward(const PairForwardArgs args) {
  constexpr bool kLosses = kTerms == Terms::losses;
  constexpr int kKinds = kLosses ? 3 : 2;  // of signs: across, down, pred - target
  const Frame& frame = args.frame;
  const Spot spot = locate_chunk<kChannels>(frame);
  RegionRows regions(args.mask, frame, spot);
  ImageRows<kTerms, kChannels> images(args.pred, args.target, frame, spot);
  images.load(spot.begin);
  regions.begin(spot.begin);

  float sum[kSums] = {};
  float above[kChannels][kQuad] = {};
  float first_above[kQuad] = {};
  uint32_t words[kChannels][kKinds];
#pragma unroll
  for (int i = 0; i < kChannels * kKinds; ++i) words[i / kKinds][i % kKinds] = kNoSigns;

#pragma unroll 1
  for (int step = 0; step <= frame.chunk_rows; ++step) {
    const int y = spot.begin + step;
    const bool own = y < spot.end;
    RegionRow row;
    regions.next(y, row);
    // A pair that does not count weighs 0: across, those of the row below the chunk; down, those above it.
    float across_weight[kQuad];
    float down_weight[kQuad];
    float hole[kQuad];
    float valid[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      across_weight[k] = own ? row.first[k + 1] * row.second[k + 2] : 0.0f;
      down_weight[k] = first_above[k] * row.second[k + 1];
      first_above[k] = own ? row.first[k + 1] : 0.0f;
      hole[k] = hole_of(args.mask, row.mask[k]);
      valid[k] = valid_of(args.mask, row.mask[k]);
      if (own && k < spot.valid) {
        sum[kHoleWeight] += hole[k];
        sum[kValidWeight] += valid[k];
        sum[kRegion] += row.first[k + 1];
      }
    }

    float here[kChannels][kQuad];
    [[maybe_unused]] float pixel_signs[kChannels];
    images.take(args.mask, row, hole, valid, here, [&](int c, int k, float d) {
      if constexpr (kLosses) {
        if (k == 0) pixel_signs[c] = kNoSignsByte;
        add_sign(own, d, k, pixel_signs[c]);
        if (own && hole[k] != 0.0f) sum[kHole] += hole[k] * fabsf(d);
        if (own && valid[k] != 0.0f) sum[kValid] += valid[k] * fabsf(d);
      }
    });
    images.load(y + 1);

    const int last_row = (y - 1) & (kQuad - 1);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float right = images.right(c, here[c][0]);
      float across_signs = kNoSignsByte;
      float down_signs = kNoSignsByte;
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const float across = (k + 1 < kQuad ? here[c][(k + 1) % kQuad] : right) - here[c][k];
        const float down = here[c][k] - above[c][k];
        if (across_weight[k] != 0.0f) sum[kAcross] += across_weight[k] * pair_penalty<kSquare>(across);
        if (down_weight[k] != 0.0f) sum[kDown] += down_weight[k] * pair_penalty<kSquare>(down);
        if constexpr (!kSquare) {
          add_sign(across_weight[k] != 0.0f, across, k, across_signs);
          add_sign(down_weight[k] != 0.0f, down, k, down_signs);
        }
        above[c][k] = here[c][k];
      }
      if constexpr (!kSquare) {
        // The down signs of a row are known a row later.
        words[c][1] = insert_signs(words[c][1], down_signs, last_row);
        if (last_row == kQuad - 1) {
          if (args.signs != nullptr && step > 0 && y - kQuad < frame.rows && c < spot.channels &&
              spot.valid > 0) {
#pragma unroll
            for (int kind = 0; kind < kKinds; ++kind) {
              args.signs[sign_index(frame, spot, kKinds, kind, c, y - 1)] = words[c][kind];
            }
          }
#pragma unroll
          for (int kind = 0; kind < kKinds; ++kind) words[c][kind] = kNoSigns;
        }
        words[c][0] = insert_signs(words[c][0], across_signs, y & (kQuad - 1));
        if constexpr (kLosses) words[c][2] = insert_signs(words[c][2], pixel_signs[c], y & (kQuad - 1));
      }
    }
  }
  const int channels = spot.channels < kChannels ? spot.channels : kChannels;
#pragma unroll
  for (int i : {kHoleWeight, kValidWeight, kRegion}) sum[i] *= static_cast<float>(channels);
  store_sums(sum, args.partials);
}

struct PairFinalArgs {
  const PairPartial* partials;  // [N, blocks]
  float* total;                 // scalars; of total variation tv alone, the others null
  float* hole;
  float* valid;
  float* tv;
  float* scale;     // [N, 2] (hole, valid) or null
  float* tv_scale;  // [2] (down, across)
  int64_t samples;
  int64_t blocks;  // per sample
  double numel;
  double pairs_down;
  double pairs_across;
  Normalize normalize;
  PairNormalize pair_normalize;
  double weight[3];  // of hole, valid and tv in the total
};

// One block. `lanes` (power of two) threads add the blocks of one sample.
template <bool kLosses>
__global__ void __launch_bounds__(kFinalThreads) pairs_finalize(const PairFinalArgs args, int lanes) {
  double sum[kSums] = {};  // over this thread's samples
  double scaled[2] = {};
  sum_samples<kSums>(
      args.samples, args.blocks, lanes,
      [&](int64_t index, double (&value)[kSums]) {
        const PairPartial partial = args.partials[index];
#pragma unroll
        for (int i = 0; i < kSums; ++i) value[i] += partial.sum[i];
      },
      [&](int64_t sample, const double (&value)[kSums]) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] += value[i];
        if (!kLosses || args.normalize != Normalize::sample) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const double scale = sample_scale(args.normalize, value[kHoleWeight + r], 0.0, args.numel,
                                            static_cast<double>(args.samples));
          scaled[r] += scale * value[kHole + r];
          args.scale[2 * sample + r] = static_cast<float>(scale);
        }
      });
  double scales[2];
  pair_scales(args.pair_normalize, args.pairs_down, args.pairs_across, args.numel, block_sum(sum[kRegion]),
              scales);
  const double tv = scales[0] * block_sum(sum[kDown]) + scales[1] * block_sum(sum[kAcross]);
  double total = args.weight[2] * tv;
  if constexpr (kLosses) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      double loss = 0.0;
      if (args.normalize == Normalize::sample) {
        loss = block_sum(scaled[r]);
      } else {
        const double scale = sample_scale(args.normalize, 0.0, block_sum(sum[kHoleWeight + r]), args.numel,
                                          static_cast<double>(args.samples));
        loss = block_sum(sum[kHole + r]) * scale;
        for (int64_t n = threadIdx.x; n < args.samples; n += kFinalThreads) {
          args.scale[2 * n + r] = static_cast<float>(scale);
        }
      }
      if (threadIdx.x == 0) *(r == 0 ? args.hole : args.valid) = static_cast<float>(loss);
      total += args.weight[r] * loss;
    }
    if (threadIdx.x == 0) *args.total = static_cast<float>(total);
  }
  if (threadIdx.x != 0) return;
  *args.tv = static_cast<float>(tv);
  args.tv_scale[0] = static_cast<float>(scales[0]);
  args.tv_scale[1] = static_cast<float>(scales[1]);
}

}  // namespace ik::cuda
