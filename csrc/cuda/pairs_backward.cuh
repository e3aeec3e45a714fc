// Backward kernel over neighbouring pixels: the gradients in one pass, from the signs alone for l1, for l2
// from the images.
//
//   d tv / d image = sum of the pairs that end at a pixel minus those that begin there, each weight * slope;
//   pred gets that times the hole, target times the rest; hole and valid terms add +- weight * sign(pred -
//   target)
//
// Bytes per element, fp32 and mask [N, 1, H, W]: 3/4 (total variation: 1/2) + 4/C + 4 a gradient.
#pragma once

#include "cuda/pairs_forward.cuh"

namespace ik::cuda {

struct PairBackwardArgs {
  Frame frame;
  MaskPlanes mask;
  const float* grad[4];    // scalars: of total, hole, valid, tv; null: contributes nothing
  float weight[3];         // of hole, valid and tv in the total
  const float* scale;      // [N, 2] (hole, valid)
  const float* tv_scale;   // [2] (down, across)
  const uint32_t* signs;   // [N, C, ceil(H / 4), kinds, ceil(W / 4)], l1 only
  Image<const void> pred;  // [N, C, H, W], l2 only
  Image<const void> target;
  Image<void> grad_pred;  // [N, C, H, W] or null
  Image<void> grad_target;
};

// The gradient that arrives at a term, its share of the total's included.
IK_DEVICE float term_gradient(const PairBackwardArgs& args, int term) {
  const float own = args.grad[term + 1] == nullptr ? 0.0f : *args.grad[term + 1];
  return args.grad[0] == nullptr ? own : own + args.weight[term] * *args.grad[0];
}

// Slopes of the penalties of a row's pairs, from their signs.
template <Terms kTerms, int kChannels>
class SignSlopes {
 public:
  __device__ __forceinline__ SignSlopes(const PairBackwardArgs& args, const Spot& spot)
      : args_(args), spot_(spot) {}

  // Row y becomes the current one.
  __device__ __forceinline__ void begin(int y) {
    shift_ = 8 * (y & (kQuad - 1));
    // The words of 4 rows; those above the chunk for its last row alone.
    if (shift_ == 0 || y < spot_.begin) load(y);
  }
  __device__ __forceinline__ void end(int, const RegionRow&) {}

  __device__ __forceinline__ float left(int c) const { return sign_at(left_[c] >> shift_, kQuad - 1); }
  __device__ __forceinline__ float across(int c, int k) const { return sign(c, 0, k); }
  __device__ __forceinline__ float down(int c, int k) const { return sign(c, 1, k); }
  __device__ __forceinline__ float pixel(int c, int k) const { return sign(c, kKinds - 1, k); }

 private:
  static constexpr int kKinds = kTerms == Terms::losses ? 3 : 2;

  __device__ __forceinline__ float sign(int c, int kind, int k) const {
    return sign_at(words_[c][kind] >> shift_, k);
  }
  __device__ __forceinline__ void load(int y) {
    const bool inside = y >= 0 && y < args_.frame.rows && spot_.valid > 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const bool wanted = inside && c < spot_.channels;
      const int64_t index = sign_index(args_.frame, spot_, kKinds, 0, c, y);
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) {
        words_[c][kind] = wanted ? args_.signs[index + kind * args_.frame.sign_quads] : kNoSigns;
      }
      const uint32_t beside = wanted && spot_.lane == 0 && spot_.x > 0 ? args_.signs[index - 1] : kNoSigns;
      const uint32_t left = __shfl_up_sync(0xffffffffu, words_[c][0], 1);
      left_[c] = spot_.lane == 0 ? beside : left;
    }
  }

  const PairBackwardArgs& args_;
  const Spot& spot_;
  uint32_t words_[kChannels][kKinds];
  uint32_t left_[kChannels];  // across, of the quad to the left
  int shift_;
};

// The same from the images: of the squared differences.
template <Terms kTerms, int kChannels>
class SquareSlopes {
 public:
  __device__ __forceinline__ SquareSlopes(const PairBackwardArgs& args, const Spot& spot)
      : args_(args), spot_(spot), images_(args.pred, args.target, args.frame, spot) {
    images_.load(spot.begin - 1);
  }

  __device__ __forceinline__ void begin(int) {}
  // Row y, the one below the current one, is known now: `row` is its region.
  __device__ __forceinline__ void end(int y, const RegionRow& row) {
    float hole[kQuad];
    float valid[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      hole[k] = hole_of(args_.mask, row.mask[k]);
      valid[k] = valid_of(args_.mask, row.mask[k]);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) here_[c][k] = below_[c][k];
      left_[c] = left_below_[c];
      right_[c] = right_below_[c];
    }
    images_.take(args_.mask, row, hole, valid, below_, [](int, int, float) {});
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      left_below_[c] = images_.left(c, below_[c][kQuad - 1]);
      right_below_[c] = images_.right(c, below_[c][0]);
    }
    images_.load(y + 1);
  }

  __device__ __forceinline__ float left(int c) const { return slope(left_[c], here_[c][0]); }
  __device__ __forceinline__ float across(int c, int k) const {
    return slope(here_[c][k], k + 1 < kQuad ? here_[c][(k + 1) % kQuad] : right_[c]);
  }
  __device__ __forceinline__ float down(int c, int k) const { return slope(here_[c][k], below_[c][k]); }

 private:
  static __device__ __forceinline__ float slope(float from, float to) { return 2.0f * (to - from); }

  const PairBackwardArgs& args_;
  const Spot& spot_;
  ImageRows<kTerms, kChannels> images_;
  float here_[kChannels][kQuad];
  float left_[kChannels];
  float right_[kChannels];
  float below_[kChannels][kQuad] = {};
  float left_below_[kChannels] = {};
  float right_below_[kChannels] = {};
};

// coefficient * weight of a pair times its slope, nothing where the weight is 0.
template <bool kSquare>
IK_DEVICE float pair_gradient(float weight, float slope) {
  // A sign is finite.
  return kSquare && weight == 0.0f ? 0.0f : weight * slope;
}

template <Terms kTerms, int kChannels, bool kSquare>
__global__ void __launch_bounds__(kThreads, 4) pairs_backward(const PairBackwardArgs args) {
  constexpr bool kLosses = kTerms == Terms::losses;
  static_assert(!kLosses || !kSquare, "inpainting_pixel composes l2 of two ops");
  const Frame& frame = args.frame;
  const Spot spot = locate_chunk<kChannels>(frame);
  const float tv = term_gradient(args, 2);
  const float down = tv * args.tv_scale[0];
  const float across = tv * args.tv_scale[1];
  float hole_coefficient = 0.0f;
  float valid_coefficient = 0.0f;
  if constexpr (kLosses) {
    hole_coefficient = term_gradient(args, 0) * args.scale[2 * static_cast<int64_t>(spot.sample)];
    valid_coefficient = term_gradient(args, 1) * args.scale[2 * static_cast<int64_t>(spot.sample) + 1];
  }
  using Slopes = std::conditional_t<kSquare, SquareSlopes<kTerms, kChannels>, SignSlopes<kTerms, kChannels>>;
  Slopes slopes(args, spot);
  RegionRows regions(args.mask, frame, spot);
  regions.begin(spot.begin - 1);

  // Of row y, whose gradient is complete when the row below it is known.
  float mask[kQuad] = {};
  float first[kQuad] = {};
  float across_weight[kQuad + 1] = {};  // of the pair to the left of pixel k
  float upper[kChannels][kQuad] = {};   // gradients of the pairs with the row above
#pragma unroll 1
  for (int step = -2; step < frame.chunk_rows; ++step) {
    const int y = spot.begin + step;
    if (step > -2) slopes.begin(y);
    RegionRow below;
    regions.next(y + 1, below);
    slopes.end(y + 1, below);
    if (step > -2) {
      float lower_weight[kQuad];
      float hole[kQuad];
      float valid[kQuad];
      [[maybe_unused]] float pixel[kQuad];
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const float weight = first[k] * below.second[k + 1];
        lower_weight[k] = weight == 0.0f ? 0.0f : down * weight;
        if constexpr (kTerms != Terms::image) {
          hole[k] = hole_of(args.mask, mask[k]);
          valid[k] = valid_of(args.mask, mask[k]);
          pixel[k] = (hole[k] == 0.0f ? 0.0f : hole_coefficient * hole[k]) +
                     (valid[k] == 0.0f ? 0.0f : valid_coefficient * valid[k]);
        }
      }
      float to_pred[kChannels][kQuad];
      [[maybe_unused]] float to_target[kChannels][kQuad];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float left = pair_gradient<kSquare>(across_weight[0], slopes.left(c));
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          const float right = pair_gradient<kSquare>(across_weight[k + 1], slopes.across(c, k));
          const float lower = pair_gradient<kSquare>(lower_weight[k], slopes.down(c, k));
          const float image = left - right + (upper[c][k] - lower);
          left = right;
          upper[c][k] = lower;
          if constexpr (kTerms == Terms::image) {
            to_pred[c][k] = image;
          } else {
            to_pred[c][k] = hole[k] == 0.0f ? 0.0f : hole[k] * image;
            to_target[c][k] = valid[k] == 0.0f ? 0.0f : valid[k] * image;
            if constexpr (kLosses) {
              const float term = pixel[k] * slopes.pixel(c, k);
              to_pred[c][k] += term;
              to_target[c][k] -= term;
            }
          }
        }
      }
      if (step >= 0 && y < spot.end) {
        const int64_t offset = spot.offset(frame, spot.x, y);
        store_quads(args.grad_pred, frame, offset, spot.channels, spot.valid, to_pred);
        if constexpr (kTerms != Terms::image) {
          store_quads(args.grad_target, frame, offset, spot.channels, spot.valid, to_target);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      mask[k] = below.mask[k];
      first[k] = below.first[k + 1];
    }
#pragma unroll
    for (int i = 0; i <= kQuad; ++i) {
      const float weight = below.first[i] * below.second[i + 1];
      across_weight[i] = weight == 0.0f ? 0.0f : across * weight;
    }
  }
}

}  // namespace ik::cuda
