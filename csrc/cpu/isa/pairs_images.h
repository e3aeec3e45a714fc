// Units of work, and the rows of the images they go over.
#pragma once

#include "cpu/isa/pairs_rows.h"

namespace ik::IK_ISA {
namespace {

// The segments of one sample and the rows one call works on.
struct Unit {
  int64_t sample, segment_begin, segment_end, row_begin, row_end;
  Unit(const PairCall& call, int64_t unit) {
    const int64_t chunks = call.chunks();
    const int64_t groups = call.segment_groups();
    row_begin = unit % chunks * call.unit_rows();
    row_end = least(row_begin + call.unit_rows(), call.rows);
    segment_begin = unit / chunks % groups * PairCall::unit_segments;
    segment_end = least(segment_begin + PairCall::unit_segments, call.shape.segments);
    sample = unit / chunks / groups;
  }
  int64_t segments() const { return segment_end - segment_begin; }
};

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
  Unit unit_{call_, 0};
  MaskRows<T> masks_[PairCall::unit_segments];
  RowRing<T> images_[PairCall::unit_segments];
  Scratch<T> pred_, target_;
};

// Writes a row of the composite; adds up hole and valid terms and packs the signs of pred - target if LOSSES.
template <bool LOSSES, typename T>
void mix_row(const T* pred, const T* target, const T* mask, int64_t n, bool mask_is_hole, T* out,
             double* hole_sum, double* valid_sum, uint8_t* positive, uint8_t* negative) {
  using V = Vec<T>;
  const V one(T(1));
  V hole_acc(T(0)), valid_acc(T(0));
  uint32_t plus, minus;
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
      hole_acc = hole_acc + select_zero_(hole, hole * value);
      valid_acc = valid_acc + select_zero_(valid, valid * value);
      plus |= d.positive_bits() << place;
      minus |= d.negative_bits() << place;
    }
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    plus = minus = 0;
    for (int place = 0; place < 32; place += V::lanes) mix(i + place, V::lanes, place);
    if (positive != nullptr) {
      store_bits<32>(plus, positive + i / 8, 32);
      store_bits<32>(minus, negative + i / 8, 32);
    }
  }
  for (; i < n; i += V::lanes) {
    plus = minus = 0;
    const int count = static_cast<int>(least(V::lanes, n - i));
    mix(i, count, 0);
    if (positive != nullptr) {
      store_bits<V::lanes>(plus, positive + i / 8, count);
      store_bits<V::lanes>(minus, negative + i / 8, count);
    }
  }
  if constexpr (LOSSES) {
    *hole_sum += hole_acc.sum();
    *valid_sum += valid_acc.sum();
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
                   call.mask_is_hole, row, static_cast<double*>(nullptr), static_cast<double*>(nullptr),
                   static_cast<uint8_t*>(nullptr), static_cast<uint8_t*>(nullptr));
  } else {
    std::memcpy(row, pred, static_cast<size_t>(call.width) * sizeof(T));
  }
  return row;
}

}  // namespace
}  // namespace ik::IK_ISA
