// Rows of the image whose pairs are summed, one after another, for the vec4s of a strip: as it is, or as the
// composite of two.
#pragma once

#include "cuda/pairs_region.cuh"

namespace ik::cuda {

// The images of a call by their weight, so that no element asks what the mask means: `weighed` by the mask
// (the target, or pred if the mask is 1 in the hole), `other` by 1 - mask. Terms::image has `other` alone.
struct ImagePair {
  Image weighed;  // [N, C, H, W]
  Image other;    // [N, C, H, W]
};

// The pixels beside the strip are loaded by its first threads: lane c has channel c of the column to the
// right, lane kChannels + c that of the column to the left.
template <Terms kTerms, int kChannels>
class ImageRows {
 public:
  // Row y comes first.
  __device__ __forceinline__ ImageRows(const ImagePair& images, const Frame& frame, const PairCoord& coord,
                                       int y)
      : images_(images), coord_(coord) {
    static_assert(2 * kChannels <= 8, "lanes of the narrowest strip");
    on_right_ = coord.lane < kChannels;
    const int c = on_right_ ? coord.lane : coord.lane - kChannels;
    const int column = on_right_ ? coord.next_x : coord.strip_x - 1;
    owner_ = c < kChannels && c < coord.channels && column >= 0 && column < frame.width;
    other_at_ = coord.in(images.other, 0, y, coord.x);
    other_beside_ = coord.in(images.other, c, y, column) - other_at_;
    if constexpr (kMixed) {
      weighed_at_ = coord.in(images.weighed, 0, y, coord.x);
      weighed_beside_ = coord.in(images.weighed, c, y, column) - weighed_at_;
    }
#pragma unroll
    for (int i = 0; i < kChannels * kVec4; ++i) other_.words[i] = weighed_.words[i] = 0;
    other_bits_ = weighed_bits_ = 0;
  }

  // Starts the loads of the next row, if it is wanted.
  __device__ __forceinline__ void load(bool wanted) {
    if (wanted) {
      load_vec4s(images_.other, other_at_, coord_.channels, coord_.valid, other_);
      if constexpr (kMixed) load_vec4s(images_.weighed, weighed_at_, coord_.channels, coord_.valid, weighed_);
      if (owner_) {
        other_bits_ = load_element(images_.other.type, other_at_ + other_beside_);
        if constexpr (kMixed) {
          weighed_bits_ = load_element(images_.weighed.type, weighed_at_ + weighed_beside_);
        }
      }
    }
    other_at_ += images_.other.row;
    if constexpr (kMixed) weighed_at_ += images_.weighed.row;
  }

  // The two images of the row last loaded. Afterwards the next may be.
  __device__ __forceinline__ void take(const RegionRow& row, float (&weighed)[kChannels][kVec4],
                                       float (&other)[kChannels][kVec4]) {
    unpack_vec4s(images_.other, other_, other);
    beside_ = element_value(images_.other.type, other_bits_);
    if constexpr (kMixed) {
      unpack_vec4s(images_.weighed, weighed_, weighed);
      beside_ = composite_value(from_lane(coord_, row.beside, on_right_ ? 2 : 1),
                                element_value(images_.weighed.type, weighed_bits_), beside_);
    }
  }

  // The pixel after or before this thread's vec4 in the row last taken, given the vec4's own first or last.
  __device__ __forceinline__ float right(int c, float first) const {
    return from_right(coord_, first, from_lane(coord_, beside_, c));
  }
  __device__ __forceinline__ float left(int c, float last) const {
    return from_left(coord_, last, from_lane(coord_, beside_, kChannels + c));
  }

 private:
  static constexpr bool kMixed = kTerms != Terms::image;

  const ImagePair& images_;
  const PairCoord& coord_;
  RawVec4s<kChannels> other_;
  RawVec4s<kChannels> weighed_;
  const char* other_at_;  // of the next row
  const char* weighed_at_;
  int64_t other_beside_;  // from there to the pixel beside the strip
  int64_t weighed_beside_;
  uint32_t other_bits_;
  uint32_t weighed_bits_;
  float beside_;
  bool on_right_;
  bool owner_;
};

// Makes `image` the composite of the two, which it holds one of.
template <Terms kTerms, int kChannels>
IK_DEVICE void mix(const RegionRow& row, const float (&weighed)[kChannels][kVec4],
                   float (&image)[kChannels][kVec4]) {
  if constexpr (kTerms != Terms::image) {
#pragma unroll
    for (int k = 0; k < kVec4; ++k) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        image[c][k] = composite_value(row.mask[k], weighed[c][k], image[c][k]);
      }
    }
  }
}

}  // namespace ik::cuda
