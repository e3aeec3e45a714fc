// Rows of the mask and of the region, one after another, for the quads of a strip.
//
// Each mask value is loaded once per chunk, a row before it is needed; the maximum of three rows rolls in
// registers and that of three columns comes from shuffles. The first four threads of a strip own the columns
// x0 - 2, x0 - 1, x1 and x1 + 1 beside it.
#pragma once

#include "cuda/pairs.cuh"

namespace ik::cuda {

// Value (y, x) of channel c of sample n is data[n * sample + c * channel + y * row + x * pixel].
struct MaskPlanes {
  const void* data;
  int64_t sample;
  int64_t channel;
  int64_t row;
  int32_t pixel;
  MaskType type;
  float cap;     // of u8: 1 for bool, as a bool tensor viewed from other bytes is true for all but 0
  bool vectors;  // whole quads, each aligned to its size
  Region region;
  bool is_hole;  // the mask is 1 in the hole
};

IK_DEVICE float hole_of(const MaskPlanes& mask, float value) { return mask.is_hole ? value : 1.0f - value; }
IK_DEVICE float valid_of(const MaskPlanes& mask, float value) { return mask.is_hole ? 1.0f - value : value; }

// One row of a quad. Index i of a region is pixel i - 1 of the quad. A pair of neighbours weighs `first` of
// its upper or left pixel times `second` of the other; both are 0 beyond the image.
struct RegionRow {
  float mask[kQuad];
  float first[kQuad + 2];
  float second[kQuad + 2];
  float beside;  // mask value of this thread's column beside the strip
};

class RegionRows {
 public:
  __device__ __forceinline__ RegionRows(const MaskPlanes& mask, const Frame& frame, const Spot& spot)
      : mask_(mask), frame_(frame), spot_(spot) {
    plane_ = spot.sample * mask.sample + spot.channel * mask.channel;
    column_ = spot.lane < 2 ? spot.strip_x + spot.lane - 2 : spot.next_x + spot.lane - 2;
    owner_ = spot.channels > 0 && spot.lane < 4 && column_ >= 0 && column_ < frame.width;
  }

  // Row y comes next.
  __device__ __forceinline__ void begin(int y) {
    float above[kQuad];
    load(y - 1);
    float beside_above;
    take(above, beside_above);
    load(y);
    take(here_, beside_);
    load(y + 1);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      upper_[k] = fmaxf(spread(above[k], y - 1, k), spread(here_[k], y, k));
    }
    beside_upper_ = fmaxf(spread_beside(beside_above, y - 1), spread_beside(beside_, y));
  }

  // Row y; the next call gives the row after it.
  __device__ __forceinline__ void next(int y, RegionRow& row) {
    float below[kQuad];
    float beside_below;
    take(below, beside_below);
    load(y + 2);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) row.mask[k] = here_[k];
    row.beside = beside_;
    const Region region = mask_.region;
    if (region == Region::image) {
#pragma unroll
      for (int i = 0; i < kQuad + 2; ++i) row.first[i] = row.second[i] = inside(y, i) ? 1.0f : 0.0f;
    } else {
      const bool dilated = region == Region::dilated_hole;
      float columns[kQuad + 4];  // from pixel -2 on: the maximum over the rows, or the hole alone
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const float hole = spread(below[k], y + 1, k);
        columns[k + 2] = dilated ? fmaxf(upper_[k], hole) : hole_of(mask_, here_[k]);
        upper_[k] = fmaxf(spread(here_[k], y, k), hole);
      }
      const float hole = spread_beside(beside_below, y + 1);
      const float beside = dilated ? fmaxf(beside_upper_, hole) : hole_of(mask_, beside_);
      beside_upper_ = fmaxf(spread_beside(beside_, y), hole);
      // The first thread wants lanes 0 and 1, the last one 2 and 3.
      const float nearer = from_lane(spot_, beside, spot_.last ? 2 : 1);
      const float farther = from_lane(spot_, beside, spot_.last ? 3 : 0);
      columns[0] = from_left(spot_, columns[kQuad], farther);
      columns[1] = from_left(spot_, columns[kQuad + 1], nearer);
      columns[kQuad + 2] = from_right(spot_, columns[2], nearer);
      columns[kQuad + 3] = from_right(spot_, columns[3], farther);
#pragma unroll
      for (int i = 0; i < kQuad + 2; ++i) {
        const float widest = fmaxf(fmaxf(columns[i], columns[i + 1]), columns[i + 2]);
        const bool in = inside(y, i);
        row.first[i] = in ? (dilated ? widest : columns[i + 1]) : 0.0f;
        row.second[i] = region == Region::first_pixel ? (in ? 1.0f : 0.0f) : row.first[i];
      }
    }
#pragma unroll
    for (int k = 0; k < kQuad; ++k) here_[k] = below[k];
    beside_ = beside_below;
  }

 private:
  __device__ __forceinline__ bool row_inside(int y) const { return y >= 0 && y < frame_.rows; }
  __device__ __forceinline__ bool inside(int y, int i) const {
    const int column = spot_.x + i - 1;
    return row_inside(y) && column >= 0 && column < frame_.width;
  }
  // What a pixel adds to the maximum over its neighbourhood, which ends at the border of the image.
  __device__ __forceinline__ float spread(float value, int y, int k) const {
    return row_inside(y) && k < spot_.valid ? hole_of(mask_, value) : -INFINITY;
  }
  __device__ __forceinline__ float spread_beside(float value, int y) const {
    return row_inside(y) && owner_ ? hole_of(mask_, value) : -INFINITY;
  }

  template <typename M>
  __device__ __forceinline__ uint32_t element(int64_t index) const {
    const M value = static_cast<const M*>(mask_.data)[index];
    if constexpr (sizeof(M) == 8) {
      return float_to_bits(static_cast<float>(value));
    } else {
      return static_cast<uint32_t>(value);
    }
  }

  // Starts the loads of a row.
  template <typename M, int kWords>
  __device__ __forceinline__ void load_of(int64_t index) {
    if (spot_.valid > 0) {
      if (mask_.vectors) {
        load_words<4 * kWords, true>(static_cast<const M*>(mask_.data) + index, raw_);
      } else {
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          const uint32_t bits =
              k < spot_.valid ? element<M>(index + static_cast<int64_t>(k) * mask_.pixel) : 0u;
          constexpr int kBits = 8 * kWords;
          raw_[k * kWords / kQuad] |= bits << (k * kBits % 32);
        }
      }
    }
    if (owner_) raw_beside_ = element<M>(index + static_cast<int64_t>(column_ - spot_.x) * mask_.pixel);
  }

  __device__ __forceinline__ void load(int y) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) raw_[k] = 0;
    raw_beside_ = 0;
    if (mask_.type == MaskType::none || spot_.channels <= 0 || !row_inside(y)) return;
    const int64_t index = plane_ + y * mask_.row + static_cast<int64_t>(spot_.x) * mask_.pixel;
    switch (mask_.type) {
      case MaskType::f32:
        return load_of<uint32_t, 4>(index);
      case MaskType::f64:
        return load_of<double, 4>(index);
      case MaskType::u8:
        return load_of<uint8_t, 1>(index);
      default:
        return load_of<uint16_t, 2>(index);
    }
  }

  // The values of the row that `load` was last called for; 0 beyond the image.
  template <typename M>
  __device__ __forceinline__ void take_as(float (&values)[kQuad], float& beside) const {
    Pack<M, kQuad> pack;
    Pack<M, kQuad> pack_beside{};
#pragma unroll
    for (int i = 0; i < pack.kWords; ++i) pack.words[i] = raw_[i];
    pack_beside.words[0] = raw_beside_;
    unpack(pack, values);
    float quad[kQuad];
    unpack(pack_beside, quad);
    beside = quad[0];
  }

  __device__ __forceinline__ void take(float (&values)[kQuad], float& beside) const {
    switch (mask_.type) {
      case MaskType::u8:
        take_as<uint8_t>(values, beside);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) values[k] = min_(values[k], mask_.cap);
        beside = min_(beside, mask_.cap);
        return;
      case MaskType::f16:
        return take_as<Half>(values, beside);
      case MaskType::bf16:
        return take_as<BFloat16>(values, beside);
      default:
        return take_as<float>(values, beside);
    }
  }

  const MaskPlanes& mask_;
  const Frame& frame_;
  const Spot& spot_;
  int64_t plane_;
  int32_t column_;  // beside the strip
  bool owner_;
  uint32_t raw_[kQuad];  // of the row below
  uint32_t raw_beside_;
  float here_[kQuad];
  float beside_;
  float upper_[kQuad];  // maximum over this row and the one above
  float beside_upper_;
};

}  // namespace ik::cuda
