// Rows of the image whose pairs are summed, one after another, for the quads of a strip: as it is, or as the
// composite of pred and target.
#pragma once

#include "cuda/pairs_region.cuh"

namespace ik::cuda {

// The pixels beside the strip are loaded by its first threads: lane c has channel c of the column to the
// right, lane kChannels + c that of the column to the left.
template <Terms kTerms, int kChannels>
class ImageRows {
 public:
  __device__ __forceinline__ ImageRows(const Image<const void>& pred, const Image<const void>& target,
                                       const Frame& frame, const Spot& spot)
      : pred_(pred), target_(target), frame_(frame), spot_(spot) {
    static_assert(2 * kChannels <= 8, "lanes of the narrowest strip");
    on_right_ = spot.lane < kChannels;
    beside_channel_ = on_right_ ? spot.lane : spot.lane - kChannels;
    column_ = on_right_ ? spot.next_x : spot.strip_x - 1;
    owner_ = beside_channel_ < kChannels && beside_channel_ < spot.channels && column_ >= 0 &&
             column_ < frame.width;
  }

  // Starts the loads of row y, of the chunk or next to it; zeros beyond the image.
  __device__ __forceinline__ void load(int y) {
    const bool wanted = y >= 0 && y <= spot_.end && y < frame_.rows;
    const int64_t offset = spot_.offset(frame_, spot_.x, y);
    const int channels = wanted ? spot_.channels : 0;
    load_quads(pred_, frame_, offset, channels, spot_.valid, pred_words_);
    if constexpr (kMixed) load_quads(target_, frame_, offset, channels, spot_.valid, target_words_);
    pred_beside_ = target_beside_ = 0;
    if (!wanted || !owner_) return;
    const int64_t index = spot_.offset(frame_, column_, y) + beside_channel_ * frame_.channel;
    pred_beside_ = load_element(pred_.type, pred_.data, index);
    if constexpr (kMixed) target_beside_ = load_element(target_.type, target_.data, index);
  }

  // The row that `load` was last called for, whose loads are free to start anew. `difference(c, k, pred -
  // target)` is called for every element.
  template <typename Difference>
  __device__ __forceinline__ void take(const MaskPlanes& mask, const RegionRow& row,
                                       const float (&hole)[kQuad], const float (&valid)[kQuad],
                                       float (&image)[kChannels][kQuad], const Difference& difference) {
    unpack_quads(pred_, frame_, pred_words_, image);
    beside_ = element_value(pred_.type, pred_beside_);
    if constexpr (kMixed) {
      float other[kChannels][kQuad];
      unpack_quads(target_, frame_, target_words_, other);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          difference(c, k, image[c][k] - other[c][k]);
          image[c][k] = composite_value(hole[k], valid[k], image[c][k], other[c][k]);
        }
      }
      const float weight = from_lane(spot_, row.beside, on_right_ ? 2 : 1);
      beside_ = composite_value(hole_of(mask, weight), valid_of(mask, weight), beside_,
                                element_value(target_.type, target_beside_));
    }
  }

  // The pixel after or before this thread's quad in the row last taken, given the quad's own first or last.
  __device__ __forceinline__ float right(int c, float first) const {
    return from_right(spot_, first, from_lane(spot_, beside_, c));
  }
  __device__ __forceinline__ float left(int c, float last) const {
    return from_left(spot_, last, from_lane(spot_, beside_, kChannels + c));
  }

 private:
  static constexpr bool kMixed = kTerms != Terms::image;

  const Image<const void>& pred_;
  const Image<const void>& target_;
  const Frame& frame_;
  const Spot& spot_;
  RawQuads<kChannels> pred_words_;
  RawQuads<kChannels> target_words_;
  bool on_right_;
  bool owner_;
  int32_t beside_channel_;
  int32_t column_;
  uint32_t pred_beside_;
  uint32_t target_beside_;
  float beside_;
};

}  // namespace ik::cuda
