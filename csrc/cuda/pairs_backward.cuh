// Backward kernel over neighbouring pixels: the gradients in one pass, from the signs alone for l1, for l2
// from the images.
//
//   d tv / d image = sum of the pairs that end at a pixel minus those that begin there, each weight * slope;
//   pred gets that times the hole, target times the rest;
//   hole and valid terms add +- weight * sign(pred - target)
//
// Bytes per element, fp32 and mask [N, 1, H, W]: 3/4 (total variation: 1/2) + 4/C + 4 a gradient.
#pragma once

#include "cuda/pairs_forward.cuh"

namespace ik::cuda {

struct PairBackwardArgs {
  Frame frame;
  MaskPlanes mask;
  const float* grad[4];   // scalars: of total, hole, valid, tv; null: contributes nothing
  float weight[3];        // of hole, valid and tv in the total
  const float* scale;     // [N, 2] (hole, valid)
  const float* tv_scale;  // [2] (down, across)
  const uint32_t* signs;  // [N, C, ceil(H / 4), kinds, ceil(W / 4)], l1 only
  ImagePair images;       // l2 only
  ImagePair grads;        // null: not wanted
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
  __device__ __forceinline__ SignSlopes(const PairBackwardArgs& args, const PairCoord& coord)
      : frame_(args.frame), coord_(coord), at_(sign_words<kTerms>(args.signs, args.frame, coord)) {}

  // Row y becomes the current one.
  __device__ __forceinline__ void begin(int y) {
    shift_ = 8 * (y & (kVec4 - 1));
    if (y < coord_.begin) {
      // Of the rows above the chunk the last one alone.
      load(y >= 0, -static_cast<int64_t>(kKinds) * frame_.sign_vec4s);
    } else if (shift_ == 0) {
      load(y < coord_.end, 0);
      at_ += static_cast<int64_t>(kKinds) * frame_.sign_vec4s;
    }
  }
  __device__ __forceinline__ void end(int, const RegionRow&) {}

  __device__ __forceinline__ float left(int c) const { return sign_at(left_[c] >> shift_, kVec4 - 1); }
  __device__ __forceinline__ float across(int c, int k) const { return sign(c, 0, k); }
  __device__ __forceinline__ float down(int c, int k) const { return sign(c, 1, k); }
  __device__ __forceinline__ float pixel(int c, int k) const { return sign(c, kKinds - 1, k); }

 private:
  static constexpr int kKinds = kSignKinds<kTerms>;

  __device__ __forceinline__ float sign(int c, int kind, int k) const {
    return sign_at(words_[c][kind] >> shift_, k);
  }
  __device__ __forceinline__ void load(bool inside, int64_t offset) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const bool wanted = inside && coord_.valid > 0 && c < coord_.channels;
      const int64_t plane = static_cast<int64_t>(c) * frame_.sign_rows * kKinds * frame_.sign_vec4s;
      const uint32_t* at = at_ + offset + plane;
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) {
        words_[c][kind] = wanted ? at[kind * static_cast<int64_t>(frame_.sign_vec4s)] : kNoSigns;
      }
      const uint32_t beside = wanted && coord_.lane == 0 && coord_.x > 0 ? at[-1] : kNoSigns;
      const uint32_t left = __shfl_up_sync(0xffffffffu, words_[c][0], 1);
      left_[c] = coord_.lane == 0 ? beside : left;
    }
  }

  const Frame& frame_;
  const PairCoord& coord_;
  const uint32_t* at_;  // of the next 4 rows
  uint32_t words_[kChannels][kKinds] = {};
  uint32_t left_[kChannels] = {};  // across, of the vec4 to the left
  int shift_ = 0;
};

// The same from the images: of the squared differences.
template <Terms kTerms, int kChannels>
class SquareSlopes {
 public:
  __device__ __forceinline__ SquareSlopes(const PairBackwardArgs& args, const PairCoord& coord)
      : frame_(args.frame), coord_(coord), images_(args.images, args.frame, coord, coord.begin - 1) {
    images_.load(coord.begin > 0);
  }

  __device__ __forceinline__ void begin(int) {}
  // Row y, the one below the current one, is known now: `row` is its region.
  __device__ __forceinline__ void end(int y, const RegionRow& row) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int k = 0; k < kVec4; ++k) here_[c][k] = below_[c][k];
      left_[c] = left_below_[c];
      right_[c] = right_below_[c];
    }
    float weighed[kChannels][kVec4];
    images_.take(row, weighed, below_);
    mix<kTerms>(row, weighed, below_);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      left_below_[c] = images_.left(c, below_[c][kVec4 - 1]);
      right_below_[c] = images_.right(c, below_[c][0]);
    }
    images_.load(y < coord_.end && y + 1 < frame_.rows);
  }

  __device__ __forceinline__ float left(int c) const { return slope(left_[c], here_[c][0]); }
  __device__ __forceinline__ float across(int c, int k) const {
    return slope(here_[c][k], k + 1 < kVec4 ? here_[c][(k + 1) % kVec4] : right_[c]);
  }
  __device__ __forceinline__ float down(int c, int k) const { return slope(here_[c][k], below_[c][k]); }

 private:
  static __device__ __forceinline__ float slope(float from, float to) { return 2.0f * (to - from); }

  const Frame& frame_;
  const PairCoord& coord_;
  ImageRows<kTerms, kChannels> images_;
  float here_[kChannels][kVec4];
  float left_[kChannels];
  float right_[kChannels];
  float below_[kChannels][kVec4] = {};
  float left_below_[kChannels] = {};
  float right_below_[kChannels] = {};
};

// Gradient of a pair: its coefficient times its slope, which may be NaN where the coefficient is 0. A sign is
// not.
template <bool kSquare>
IK_DEVICE float pair_gradient(float coefficient, float slope) {
  return kSquare && coefficient == 0.0f ? 0.0f : coefficient * slope;
}

template <Terms kTerms, int kChannels, bool kSquare>
__global__ void __launch_bounds__(kThreads, (kPairBackwardBlocks<kTerms, kChannels, kSquare>))
    pairs_backward(const PairBackwardArgs args) {
  constexpr bool kLosses = kTerms == Terms::losses;
  static_assert(!kLosses || !kSquare, "inpainting_pixel makes its l2 of two ops");
  const Frame& frame = args.frame;
  const PairCoord coord = locate_chunk<kChannels>(frame);
  const float tv = term_gradient(args, 2);
  const float down = tv * args.tv_scale[0];
  const float across = tv * args.tv_scale[1];
  float pixel_coefficient[2] =
      {};  // of the mask and of 1 - mask; negative if pred - target is weighed - other
  if constexpr (kLosses) {
    const float* scale = args.scale + 2 * static_cast<int64_t>(coord.sample);
    const float hole = term_gradient(args, 0) * scale[0];
    const float valid = term_gradient(args, 1) * scale[1];
    pixel_coefficient[0] = args.mask.is_hole ? -hole : valid;
    pixel_coefficient[1] = args.mask.is_hole ? -valid : hole;
  }
  using Slopes = std::conditional_t<kSquare, SquareSlopes<kTerms, kChannels>, SignSlopes<kTerms, kChannels>>;
  Slopes slopes(args, coord);
  RegionRows regions(args.mask, frame, coord);
  regions.begin(coord.begin - 1);
  char* other_at = coord.in(args.grads.other, 0, coord.begin, coord.x);
  [[maybe_unused]] char* weighed_at = coord.in(args.grads.weighed, 0, coord.begin, coord.x);

  // Of row y, whose gradient is complete when the row below it is known.
  float mask[kVec4] = {};
  float first[kVec4] = {};
  float across_coefficient[kVec4 + 1] = {};  // of the pair to the left of pixel k
  float upper[kChannels][kVec4] = {};        // gradients of the pairs with the row above
#pragma unroll 1
  for (int step = -2; step < frame.chunk_rows; ++step) {
    const int y = coord.begin + step;
    if (step > -2) slopes.begin(y);
    RegionRow below;
    regions.next(y + 1, below);
    slopes.end(y + 1, below);
    if (step > -2) {
      float down_coefficient[kVec4];
      [[maybe_unused]] float pixel[kVec4];
#pragma unroll
      for (int k = 0; k < kVec4; ++k) {
        // Signs say themselves that a pair lacks a pixel.
        const bool inside = !kSquare || (y >= 0 && y + 1 < frame.rows);
        const float weight = first[k] * below.second[k + 1];
        down_coefficient[k] = inside && weight != 0.0f ? down * weight : 0.0f;
        if constexpr (kLosses) {
          const float rest = 1.0f - mask[k];
          pixel[k] = (mask[k] == 0.0f ? 0.0f : pixel_coefficient[0] * mask[k]) +
                     (rest == 0.0f ? 0.0f : pixel_coefficient[1] * rest);
        }
      }
      float to_other[kChannels][kVec4];
      [[maybe_unused]] float to_weighed[kChannels][kVec4];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float left = pair_gradient<kSquare>(across_coefficient[0], slopes.left(c));
#pragma unroll
        for (int k = 0; k < kVec4; ++k) {
          const float right = pair_gradient<kSquare>(across_coefficient[k + 1], slopes.across(c, k));
          const float lower = pair_gradient<kSquare>(down_coefficient[k], slopes.down(c, k));
          const float image = left - right + (upper[c][k] - lower);
          left = right;
          upper[c][k] = lower;
          to_other[c][k] = image;
          if constexpr (kTerms != Terms::image) {
            const float rest = 1.0f - mask[k];
            to_other[c][k] = rest == 0.0f ? 0.0f : rest * image;
            to_weighed[c][k] = mask[k] == 0.0f ? 0.0f : mask[k] * image;
          }
          if constexpr (kLosses) {
            const float sign = slopes.pixel(c, k);
            to_other[c][k] += pixel[k] * sign;
            to_weighed[c][k] -= pixel[k] * sign;
          }
        }
      }
      if (step >= 0) {
        const bool own = y < coord.end;
        if (own && args.grads.other.data != nullptr) {
          store_vec4s(args.grads.other, other_at, coord.channels, coord.valid, to_other);
        }
        other_at += args.grads.other.row;
        if constexpr (kTerms != Terms::image) {
          if (own && args.grads.weighed.data != nullptr) {
            store_vec4s(args.grads.weighed, weighed_at, coord.channels, coord.valid, to_weighed);
          }
          weighed_at += args.grads.weighed.row;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kVec4; ++k) {
      mask[k] = below.mask[k];
      first[k] = below.first[k + 1];
    }
#pragma unroll
    for (int i = 0; i <= kVec4; ++i) {
      const bool inside = !kSquare || (coord.x + i > 0 && coord.x + i < frame.width);
      const float weight = below.first[i] * below.second[i + 1];
      across_coefficient[i] = inside && weight != 0.0f ? across * weight : 0.0f;
    }
  }
}

}  // namespace ik::cuda
