// The rows of the images that units of work go over.
#pragma once

#include "cpu/isa/pairs_rows.h"

namespace ik::IK_ISA {
namespace {

// Everything a range of units works with, allocated once.
template <typename T>
class Rows {
 public:
  explicit Rows(const PairCall& call)
      : call_(call),
        masks_{MaskRows<T>(call), MaskRows<T>(call), MaskRows<T>(call), MaskRows<T>(call)},
        images_{ring(), ring(), ring(), ring()},
        pred_(call.width),
        target_(call.width) {}

  void begin(const Unit& unit) {
    unit_ = unit;
    for (int64_t i = 0; i < unit.segments(); ++i) {
      masks_[i].begin(unit.sample, unit.segment_begin + i);
      images_[i].reset();
    }
  }
  // Of a segment, counted from the first of the unit; the first one's if they share it.
  MaskRows<T>& mask(int64_t segment) { return masks_[call_.shape.mask_stride_c == 0 ? 0 : segment]; }

  int64_t offset(int64_t segment, int64_t y) const {
    const int64_t row = unit_.sample * call_.shape.segments + unit_.segment_begin + segment;
    return (row * call_.rows + y) * call_.width;
  }
  const T* pred(int64_t segment, int64_t y) {
    return fetch(call_.pred, call_.pred_dtype, offset(segment, y), call_.width, pred_.get());
  }
  const T* target(int64_t segment, int64_t y) {
    return fetch(call_.target, call_.target_dtype, offset(segment, y), call_.width, target_.get());
  }
  // The buffer of a row of the image whose total variation is wanted.
  T* image_slot(int64_t segment, int64_t y, bool& ready) { return images_[segment].slot(y, ready); }
  const T* image_beyond(int64_t segment) { return images_[segment].zeros(); }

 private:
  RowRing<T> ring() const { return RowRing<T>(call_.width, call_.step + 16); }
  const PairCall& call_;
  Unit unit_{};
  MaskRows<T> masks_[PairCall::unit_segments];
  RowRing<T> images_[PairCall::unit_segments];
  Scratch<T> pred_, target_;
};

// Writes a row of the composite. LOSSES: adds up the hole and valid terms and packs the signs of pred - target
// into two planes of `groups` bytes, unless `signs` is null.
template <bool LOSSES, typename T>
void mix_row(const T* pred, const T* target, const T* mask, int64_t n, bool mask_is_hole, T* out,
             PairSums* sums, uint8_t* signs, int64_t groups) {
  using V = Vec<T>;
  const V one(T(1));
  V hole_sum(T(0)), valid_sum(T(0));
  uint32_t positive, negative;
  const auto mix = [&](int64_t i, int count, int place) __attribute__((always_inline)) {
    prefetch(pred + i);
    prefetch(target + i);
    const V p = load_part<V>(pred + i, count);
    const V t = load_part<V>(target + i, count);
    V hole, valid;
    split_regions(load_part<V>(mask + i, count), one, mask_is_hole, hole, valid);
    store_part(select_zero_(hole, hole * p) + select_zero_(valid, valid * t), out + i, count);
    if constexpr (LOSSES) {
      const V d = p - t;
      const V value = abs_(d);
      hole_sum = hole_sum + select_zero_(hole, hole * value);
      valid_sum = valid_sum + select_zero_(valid, valid * value);
      positive |= d.positive_bits() << place;
      negative |= d.negative_bits() << place;
    }
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    positive = negative = 0;
    for (int place = 0; place < 32; place += V::lanes) mix(i + place, V::lanes, place);
    if (signs != nullptr) {
      store_bits<32>(positive, signs + i / 8, 32);
      store_bits<32>(negative, signs + groups + i / 8, 32);
    }
  }
  for (; i < n; i += V::lanes) {
    positive = negative = 0;
    const int count = static_cast<int>(least(V::lanes, n - i));
    mix(i, count, 0);
    if (signs != nullptr) {
      store_bits<V::lanes>(positive, signs + i / 8, count);
      store_bits<V::lanes>(negative, signs + groups + i / 8, count);
    }
  }
  if constexpr (LOSSES) {
    sums->hole += hole_sum.sum();
    sums->valid += valid_sum.sum();
  }
}

// A row of the image whose total variation is wanted, without its losses.
template <typename T>
const T* image_row(const PairCall& call, Rows<T>& rows, int64_t segment, int64_t y) {
  bool ready;
  T* row = rows.image_slot(segment, y, ready);
  if (ready) return row;
  const T* pred = rows.pred(segment, y);
  if (call.composite) {
    mix_row<false>(pred, rows.target(segment, y), rows.mask(segment).weights(y), call.width,
                   call.mask_is_hole, row, nullptr, nullptr, 0);
  } else {
    std::memcpy(row, pred, static_cast<size_t>(call.width) * sizeof(T));
  }
  return row;
}

}  // namespace
}  // namespace ik::IK_ISA
