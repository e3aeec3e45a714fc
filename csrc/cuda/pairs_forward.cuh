// Forward kernels over neighbouring pixels: one pass over the images that leaves the sums of every block and
// the signs, then one block that adds the sums in double, in a fixed order, and writes losses and scales.
//
// Bytes per element, fp32 images and mask [N, 1, H, W]: 8 + 4/C, 3/4 of signs (total variation 4, or 8 + 4/C
// of a composite, and 1/2).
#pragma once

#include "cuda/pairs_image.cuh"
#include "cuda/sums.cuh"

namespace ik::cuda {

// In a kernel the first four are those of the mask and of 1 - mask.
enum Sum : int { kHole, kValid, kHoleWeight, kValidWeight, kDown, kAcross, kRegion, kSums };

struct alignas(16) PairPartial {
  float sum[kSums + 1];
};

struct PairForwardArgs {
  Frame frame;
  MaskPlanes mask;
  ImagePair images;
  bool sum_region;
  PairPartial* partials;  // [N, blocks]
  uint32_t* signs;        // [N, C, ceil(H / 4), kinds, ceil(W / 4)] or null
};

template <bool kSquare>
IK_DEVICE float pair_penalty(float d) {
  return kSquare ? d * d : fabsf(d);
}

// Stores a block's sums. `swap`: the mask's are those of the valid region.
IK_DEVICE void store_sums(float (&sum)[kSums], bool swap, PairPartial* partials) {
  sum_block<kThreads>(sum);
  if (threadIdx.x != 0) return;
  PairPartial partial{};
#pragma unroll
  for (int i = 0; i < kSums; ++i) partial.sum[i] = swap && i < kDown ? sum[i ^ 1] : sum[i];
  partials[blockIdx.x] = partial;
}

template <Terms kTerms, int kChannels, bool kSquare>
__global__ void __launch_bounds__(kThreads, kPairBlocks<kChannels>)
    pairs_forward(const PairForwardArgs args) {
  constexpr bool kLosses = kTerms == Terms::losses;
  constexpr int kKinds = kSignKinds<kTerms>;
  const Frame& frame = args.frame;
  const PairCoord coord = locate_chunk<kChannels>(frame);
  RegionRows regions(args.mask, frame, coord);
  ImageRows<kTerms, kChannels> images(args.images, frame, coord, coord.begin);
  images.load(coord.begin < coord.end);
  regions.begin(coord.begin);

  float sum[kSums] = {};
  float above[kChannels][kVec4] = {};
  float first_above[kVec4] = {};
  uint32_t words[kChannels][kKinds];
#pragma unroll
  for (int i = 0; i < kChannels * kKinds; ++i) words[i / kKinds][i % kKinds] = kNoSigns;
  uint32_t* signs = sign_words<kTerms>(args.signs, frame, coord);

  // Stores the words of the 4 rows from y on and begins new ones.
  const auto store_signs = [&](int kind, int y) {
    const bool inside = args.signs != nullptr && coord.valid > 0 && y < coord.end;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int64_t plane = static_cast<int64_t>(c) * frame.sign_rows * kKinds + kind;
      if (inside && c < coord.channels) signs[plane * frame.sign_vec4s] = words[c][kind];
      words[c][kind] = kNoSigns;
    }
  };

#pragma unroll 1
  for (int step = 0; step <= frame.chunk_rows; ++step) {
    const int y = coord.begin + step;
    const bool own = y < coord.end;
    RegionRow row;
    regions.next(y, row);
    float weighed[kChannels][kVec4];
    float here[kChannels][kVec4];
    images.take(row, weighed, here);

    if constexpr (kLosses) {
      if (own) {
        float byte[kChannels];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) byte[c] = kNoSignsByte;
#pragma unroll
        for (int k = 0; k < kVec4; ++k) {
          const float mask = row.mask[k];
          const float rest = 1.0f - mask;
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            const float d = here[c][k] - weighed[c][k];
            if (mask != 0.0f) sum[kHole] += mask * fabsf(d);
            if (rest != 0.0f) sum[kValid] += rest * fabsf(d);
            add_sign(true, d, k, byte[c]);
          }
          if (k < coord.valid) {
            sum[kHoleWeight] += mask;
            sum[kValidWeight] += rest;
          }
        }
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          // Of pred - target.
          if (args.mask.is_hole) byte[c] = 2.0f * kNoSignsByte - byte[c];
          words[c][2] = insert_signs(words[c][2], byte[c], step % kVec4);
        }
      }
    }
    if (args.sum_region && own) {
#pragma unroll
      for (int k = 0; k < kVec4; ++k) {
        if (k < coord.valid) sum[kRegion] += row.first[k + 1];
      }
    }
    mix<kTerms>(row, weighed, here);
    images.load(y < coord.end && y + 1 < frame.rows);

    // 0 for pairs of another chunk or with no pixel.
    float across_weight[kVec4];
    float down_weight[kVec4];
#pragma unroll
    for (int k = 0; k < kVec4; ++k) {
      const bool inside = coord.x + k + 1 < frame.width;
      across_weight[k] = own && inside ? row.first[k + 1] * row.second[k + 2] : 0.0f;
      down_weight[k] = first_above[k] * row.second[k + 1];
      first_above[k] = own && y + 1 < frame.rows ? row.first[k + 1] : 0.0f;
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float right = images.right(c, here[c][0]);
      float across_byte = kNoSignsByte;
      float down_byte = kNoSignsByte;
#pragma unroll
      for (int k = 0; k < kVec4; ++k) {
        const float across = (k + 1 < kVec4 ? here[c][(k + 1) % kVec4] : right) - here[c][k];
        const float down = here[c][k] - above[c][k];
        if (across_weight[k] != 0.0f) sum[kAcross] += across_weight[k] * pair_penalty<kSquare>(across);
        if (down_weight[k] != 0.0f) sum[kDown] += down_weight[k] * pair_penalty<kSquare>(down);
        if constexpr (!kSquare) {
          add_sign(across_weight[k] != 0.0f, across, k, across_byte);
          add_sign(down_weight[k] != 0.0f, down, k, down_byte);
        }
        above[c][k] = here[c][k];
      }
      if constexpr (!kSquare) {
        words[c][0] = insert_signs(words[c][0], across_byte, step % kVec4);
        words[c][1] = insert_signs(words[c][1], down_byte, (step + kVec4 - 1) % kVec4);
      }
    }
    if constexpr (!kSquare) {
      // The down signs of a row are known a row later than the others.
      if (step % kVec4 == kVec4 - 1) {
        store_signs(0, y - kVec4 + 1);
        if constexpr (kLosses) store_signs(2, y - kVec4 + 1);
      } else if (step > 0 && step % kVec4 == 0) {
        store_signs(1, y - kVec4);
        signs += static_cast<int64_t>(kKinds) * frame.sign_vec4s;
      }
    }
  }
  const int channels = coord.valid == 0 ? 0 : (coord.channels < kChannels ? coord.channels : kChannels);
#pragma unroll
  for (int i : {kHoleWeight, kValidWeight, kRegion}) sum[i] *= static_cast<float>(channels);
  store_sums(sum, !args.mask.is_hole, args.partials);
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
  [[maybe_unused]] double scaled[2] = {};
  sum_samples<kSums>(
      args.samples, args.blocks, lanes,
      [&](int64_t sample, int64_t block, double (&value)[kSums]) {
        const PairPartial partial = args.partials[sample * args.blocks + block];
#pragma unroll
        for (int i = 0; i < kSums; ++i) value[i] += partial.sum[i];
      },
      [&](int64_t sample, const double (&value)[kSums]) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sum[i] += value[i];
        if constexpr (kLosses) {
          if (args.normalize != Normalize::sample) return;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const double scale = sample_scale(args.normalize, value[kHoleWeight + r], 0.0, args.numel,
                                              static_cast<double>(args.samples));
            scaled[r] += scale * value[kHole + r];
            args.scale[2 * sample + r] = static_cast<float>(scale);
          }
        }
      });
  double scales[2];
  pair_scales(args.pair_normalize, args.pairs_down, args.pairs_across, args.numel,
              sum_block<kFinalThreads>(sum[kRegion]), scales);
  const double tv =
      scales[0] * sum_block<kFinalThreads>(sum[kDown]) + scales[1] * sum_block<kFinalThreads>(sum[kAcross]);
  double total = args.weight[2] * tv;
  if constexpr (kLosses) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      double loss = 0.0;
      if (args.normalize == Normalize::sample) {
        loss = sum_block<kFinalThreads>(scaled[r]);
      } else {
        loss = loss_of_one_scale<2>(args.normalize, sum[kHole + r], sum[kHoleWeight + r], args.numel,
                                    args.samples, args.scale + r);
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
