// Rows of the mask and of the region, one after another, for the vec4s of a strip.
//
// Each mask value is loaded once per chunk, a row before it is needed; the maximum of three rows rolls in
// registers and that of three columns comes from shuffles. The first four threads of a strip own the columns
// -2, -1, and 0, 1 of the next strip. Beyond the image the nearest pixel stands in: it belongs to the
// neighbourhood anyway.
#pragma once

#include "cuda/pairs.cuh"

namespace ik::cuda {

// Value (y, x) of channel c of sample n is data[n * sample + c * channel + y * row + x * pixel].
struct MaskPlanes {
  const void* data;
  int64_t sample;
  int64_t channel;
  int32_t row;
  int32_t pixel;
  ElementType type;
  float cap;     // of u8: mask_cap in arguments.cuh
  bool vectors;  // whole vec4s, each aligned to its size
  Region region;
  // The hole is (is_hole ? mask : 1 - mask) = bias + sign * mask, and so is its maximum, of sign * mask.
  bool is_hole;
  float sign;
  float bias;
};

// One row of a vec4. Index i of a region is pixel i - 1 of the vec4. A pair of neighbours weighs `first` of
// its upper or left pixel times `second` of the other; what is beyond the image is for the caller to exclude.
struct RegionRow {
  float mask[kVec4];
  float first[kVec4 + 2];
  float second[kVec4 + 2];
  float beside;  // mask value of this thread's column beside the strip
};

class RegionRows {
 public:
  __device__ __forceinline__ RegionRows(const MaskPlanes& mask, const Frame& frame, const PairCoord& coord)
      : mask_(mask), frame_(frame), coord_(coord) {
    const int64_t plane = coord.sample * mask.sample + coord.channel * mask.channel;
    const int column = coord.lane < 2 ? coord.strip_x + coord.lane - 2 : coord.next_x + coord.lane - 2;
    at_ = plane + static_cast<int64_t>(coord.x) * mask.pixel;
    beside_at_ = plane + static_cast<int64_t>(inside(column)) * mask.pixel;
#pragma unroll
    for (int k = 0; k < kVec4; ++k) raw_[k] = 0;
    raw_beside_ = 0;
  }

  // Row y comes next.
  __device__ __forceinline__ void begin(int y) {
    float above[kVec4];
    float beside_above;
    load(y - 1);
    take(above, beside_above);
    load(y);
    take(here_, beside_);
    load(y + 1);
#pragma unroll
    for (int k = 0; k < kVec4; ++k) upper_[k] = fmaxf(mask_.sign * above[k], mask_.sign * here_[k]);
    beside_upper_ = fmaxf(mask_.sign * beside_above, mask_.sign * beside_);
  }

  // Row y; the next call gives the row after it.
  __device__ __forceinline__ void next(int y, RegionRow& row) {
    float below[kVec4];
    float beside_below;
    take(below, beside_below);
    load(y + 2);
#pragma unroll
    for (int k = 0; k < kVec4; ++k) row.mask[k] = here_[k];
    row.beside = beside_;
    if (mask_.region == Region::image) {
#pragma unroll
      for (int i = 0; i < kVec4 + 2; ++i) row.first[i] = row.second[i] = 1.0f;
    } else {
      const bool dilated = mask_.region == Region::dilated_hole;
      float columns[kVec4 + 4];  // from pixel -2 on: the maximum over the rows, or of this row alone
#pragma unroll
      for (int k = 0; k < kVec4; ++k) {
        const float here = mask_.sign * here_[k];
        const float under = mask_.sign * below[k];
        columns[k + 2] = dilated ? fmaxf(upper_[k], under) : here;
        upper_[k] = fmaxf(here, under);
      }
      const float under = mask_.sign * beside_below;
      const float beside = dilated ? fmaxf(beside_upper_, under) : mask_.sign * beside_;
      beside_upper_ = fmaxf(mask_.sign * beside_, under);
      // The first thread wants lanes 0 and 1, the last one 2 and 3.
      const float nearer = from_lane(coord_, beside, coord_.last ? 2 : 1);
      const float farther = from_lane(coord_, beside, coord_.last ? 3 : 0);
      columns[0] = from_left(coord_, columns[kVec4], farther);
      columns[1] = from_left(coord_, columns[kVec4 + 1], nearer);
      const float right = from_right(coord_, columns[2], nearer);
      columns[kVec4 + 2] = coord_.at_border ? columns[kVec4 + 1] : right;
      columns[kVec4 + 3] = from_right(coord_, columns[3], farther);
#pragma unroll
      for (int i = 0; i < kVec4 + 2; ++i) {
        const float widest = fmaxf(fmaxf(columns[i], columns[i + 1]), columns[i + 2]);
        row.first[i] = mask_.bias + (dilated ? widest : columns[i + 1]);
        row.second[i] = mask_.region == Region::first_pixel ? 1.0f : row.first[i];
      }
    }
#pragma unroll
    for (int k = 0; k < kVec4; ++k) here_[k] = below[k];
    beside_ = beside_below;
  }

 private:
  __device__ __forceinline__ int inside(int column) const {
    return column < 0 ? 0 : (column < frame_.width ? column : frame_.width - 1);
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

  template <typename M, int kWords>
  __device__ __forceinline__ void load_row(int64_t row) {
    if (mask_.vectors) {
      if (coord_.valid > 0) {
        load_words<4 * kWords, true>(static_cast<const M*>(mask_.data) + at_ + row, raw_);
      }
    } else if (coord_.valid > 0) {
      uint32_t packed[kVec4] = {};
#pragma unroll
      for (int k = 0; k < kVec4; ++k) {
        const int offset = k < coord_.valid ? k : coord_.valid - 1;
        const uint32_t bits = element<M>(at_ + row + static_cast<int64_t>(offset) * mask_.pixel);
        packed[k * kWords / kVec4] |= bits << (8 * kWords * k % 32);
      }
#pragma unroll
      for (int k = 0; k < kVec4; ++k) raw_[k] = packed[k];
    }
    if (coord_.channels > 0 && coord_.lane < 4) raw_beside_ = element<M>(beside_at_ + row);
  }

  // Starts the loads of a row.
  __device__ __forceinline__ void load(int y) {
    const int last = frame_.rows - 1;
    const int64_t row = static_cast<int64_t>(y < 0 ? 0 : (y < last ? y : last)) * mask_.row;
    switch (mask_.type) {
      case ElementType::none:
        return;
      case ElementType::f32:
        return load_row<uint32_t, 4>(row);
      case ElementType::f64:
        return load_row<double, 4>(row);
      case ElementType::u8:
        return load_row<uint8_t, 1>(row);
      default:
        return load_row<uint16_t, 2>(row);
    }
  }

  template <typename M>
  __device__ __forceinline__ void take_as(float (&values)[kVec4], float& beside) const {
    Pack<M, kVec4> pack;
    Pack<M, kVec4> pack_beside{};
#pragma unroll
    for (int i = 0; i < pack.kWords; ++i) pack.words[i] = raw_[i];
    pack_beside.words[0] = raw_beside_;
    unpack(pack, values);
    float vec4[kVec4];
    unpack(pack_beside, vec4);
    beside = vec4[0];
  }

  // The values of the row that `load` was last called for.
  __device__ __forceinline__ void take(float (&values)[kVec4], float& beside) const {
    if (mask_.type != ElementType::u8) {
      // A double was rounded to float when it was loaded.
      with_image_type(mask_.type, [&](auto type) { take_as<typename decltype(type)::type>(values, beside); });
      return;
    }
    take_as<uint8_t>(values, beside);
#pragma unroll
    for (int k = 0; k < kVec4; ++k) values[k] = min_(values[k], mask_.cap);
    beside = min_(beside, mask_.cap);
  }

  const MaskPlanes& mask_;
  const Frame& frame_;
  const PairCoord& coord_;
  int64_t at_;  // of the vec4 and of the column beside the strip, in row 0
  int64_t beside_at_;
  uint32_t raw_[kVec4];  // of the row below
  uint32_t raw_beside_;
  float here_[kVec4];
  float beside_;
  float upper_[kVec4];  // maximum over this row and the one above
  float beside_upper_;
};

}  // namespace ik::cuda
