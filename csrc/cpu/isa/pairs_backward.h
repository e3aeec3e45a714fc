// Backward over neighbouring pixels: from the signs for l1, from three rows of the image for l2.
#pragma once

#include "cpu/isa/pairs_images.h"
#include "cpu/isa/sign_bytes.h"

namespace ik::IK_ISA {
namespace {

// The signs of a segment, row by row downwards.
class SignRows {
 public:
  SignRows(const PairCall& call)
      : call_(call),
        groups_(call.groups()),
        front_((call.step + kSignBlock - 1) / kSignBlock * kSignBlock),
        stride_(front_ + (8 * groups_ / kSignBlock + 2) * kSignBlock),
        bytes_(4 * stride_) {
    std::memset(bytes_.get(), 0, static_cast<size_t>(4 * stride_));
  }

  // Goes to row `y`; `first`: not from the row above it.
  void go_to(int64_t sample, int64_t segment, int64_t y, bool first) {
    const uint8_t* planes = call_.sign_row(sample, segment, y);
    above_ ^= 1;
    if (first && y > 0) {
      unpack(call_.sign_row(sample, segment, y - 1) + 2 * groups_, row(above_));
    } else if (first) {
      std::memset(row(above_), 0, static_cast<size_t>(8 * groups_));
    }
    unpack(planes + 2 * groups_, row(above_ ^ 1));
    unpack(planes, row(2));
    if (call_.losses) unpack(planes + 4 * groups_, row(3));
  }
  // Of the next pixel minus this one: across (0 before the first pixel), down, down from the row above; and
  // of pred - target.
  const int8_t* across() { return row(2); }
  const int8_t* down() { return row(above_ ^ 1); }
  const int8_t* above() { return row(above_); }
  const int8_t* pixel() { return row(3); }

 private:
  int8_t* row(int i) { return bytes_.get() + i * stride_ + front_; }
  void unpack(const uint8_t* planes, int8_t* out) { unpack_signs(planes, planes + groups_, groups_, out); }

  const PairCall& call_;
  int64_t groups_, front_, stride_;
  int above_ = 0;
  Scratch<int8_t> bytes_;
};

// Weights of the four pairs of a pixel: row of this pixel, of the one above and of the one below.
template <typename T>
struct PairRows {
  const T *first, *first_above, *second, *second_below;
};

// Gradients of one row.
template <typename T>
struct GradientRow {
  const T* mask;
  int64_t n, step;
  T hole, valid, down, across;
  bool mask_is_hole;
  T* grad_pred;
  T* grad_target;
  bool stream;
};

// From the gradient of the image: that of pred and target. `sign`: of pred - target.
template <bool COMPOSITE, bool LOSSES, typename T>
IK_INLINE void write_gradient(const GradientRow<T>& row, Vec<T> image, Vec<T> sign, int64_t i, int count) {
  using V = Vec<T>;
  V to_pred = image;
  V to_target(T(0));
  if constexpr (COMPOSITE) {
    V hole, valid;
    split_regions(load_part<V>(row.mask + i, count), V(T(1)), row.mask_is_hole, hole, valid);
    to_pred = select_zero_(hole, hole * image);
    to_target = select_zero_(valid, valid * image);
    if constexpr (LOSSES) {
      const V weight = select_zero_(hole, hole * V(row.hole)) + select_zero_(valid, valid * V(row.valid));
      const V pixel = weight * sign;
      to_pred = to_pred + pixel;
      to_target = to_target - pixel;
    }
  }
  if (row.grad_pred) store_part(to_pred, row.grad_pred + i, count, row.stream);
  if (row.grad_target) store_part(to_target, row.grad_target + i, count, row.stream);
}

template <bool WEIGHTED, bool COMPOSITE, bool LOSSES, typename T>
void sign_gradient(const GradientRow<T>& given, SignRows& signs, const PairRows<T>& pairs) {
  using V = Vec<T>;
  const GradientRow<T> row = given;  // whose numbers no store of a gradient can change
  const V down(row.down), across(row.across), zero(T(0));
  const int8_t *right = signs.across(), *left = right - row.step;
  const int8_t *lower = signs.down(), *upper = signs.above(), *pixel = signs.pixel();
  for_each_vector<V>(row.n, [&](int64_t i, int count) __attribute__((always_inline)) {
    // + the pairs that end here, - those that begin here.
    V horizontal, vertical;
    if constexpr (WEIGHTED) {
      const V first = load_part<V>(pairs.first + i, count);
      const V second = load_part<V>(pairs.second + i, count);
      const V before = load_part<V>(pairs.first + i - row.step, count) * second;
      const V after = load_part<V>(pairs.second + i + row.step, count) * first;
      horizontal = load_signs<V>(left + i) * before - load_signs<V>(right + i) * after;
      const V over = load_part<V>(pairs.first_above + i, count) * second;
      const V under = load_part<V>(pairs.second_below + i, count) * first;
      vertical = load_signs<V>(upper + i) * over - load_signs<V>(lower + i) * under;
    } else {
      horizontal = load_difference<V>(left + i, right + i);
      vertical = load_difference<V>(upper + i, lower + i);
    }
    write_gradient<COMPOSITE, LOSSES>(row, fma_(across, horizontal, down * vertical),
                                      LOSSES ? load_signs<V>(pixel + i) : zero, i, count);
  });
}

// l2: from three rows of the image.
template <bool COMPOSITE, typename T>
void square_gradient(const GradientRow<T>& row, const T* above, const T* image, const T* below,
                     const PairRows<T>& pairs) {
  using V = Vec<T>;
  const V down(row.down + row.down), across(row.across + row.across);
  for_each_vector<V>(row.n, [&](int64_t i, int count) __attribute__((always_inline)) {
    const V here = load_part<V>(image + i, count);
    const V first = load_part<V>(pairs.first + i, count);
    const V second = load_part<V>(pairs.second + i, count);
    const auto pair = [&](V weight, V d) { return select_zero_(weight, weight * d); };
    const V left = pair(load_part<V>(pairs.first + i - row.step, count) * second,
                        here - load_part<V>(image + i - row.step, count));
    const V right = pair(first * load_part<V>(pairs.second + i + row.step, count),
                         load_part<V>(image + i + row.step, count) - here);
    const V upper =
        pair(load_part<V>(pairs.first_above + i, count) * second, here - load_part<V>(above + i, count));
    const V lower =
        pair(first * load_part<V>(pairs.second_below + i, count), load_part<V>(below + i, count) - here);
    write_gradient<COMPOSITE, false>(row, across * (left - right) + down * (upper - lower), V(T(0)), i,
                                     count);
  });
}

template <typename T>
void backward_units(const PairCall& call, int64_t unit_begin, int64_t unit_end) {
  Rows<T> rows(call);
  const int64_t n = call.width;
  const bool l1 = call.penalty == Penalty::l1;
  Scratch<T> pred_buffer(n), target_buffer(n);
  SignRows signs(call);
  for (int64_t index = unit_begin; index < unit_end; ++index) {
    const Unit unit = call.unit(index);
    rows.begin(unit);
    const PairCoefficients& c = call.coefficients[unit.sample];
    for (int64_t s = 0; s < unit.segments(); ++s) {
      const int64_t segment = unit.segment_begin + s;
      for (int64_t y = unit.begin; y < unit.end; ++y) {
        const int64_t offset = rows.offset(s, y);
        MaskRows<T>& mask = rows.mask(s);
        PairRows<T> pairs{};
        if (call.pair_weights || !l1) {
          pairs = {mask.first(y), mask.first(y - 1), mask.second(y), mask.second(y + 1)};
        }
        GradientRow<T> row;
        row.mask = call.composite ? mask.weights(y) : nullptr;
        row.n = n;
        row.step = call.step;
        row.hole = static_cast<T>(c.hole);
        row.valid = static_cast<T>(c.valid);
        row.down = static_cast<T>(c.down);
        row.across = static_cast<T>(c.across);
        row.mask_is_hole = call.mask_is_hole;
        row.grad_pred = output_at(call.grad_pred, call.pred_dtype, offset, pred_buffer.get());
        row.grad_target = output_at(call.grad_target, call.target_dtype, offset, target_buffer.get());
        row.stream = call.stream && aligned(row.grad_pred) && aligned(row.grad_target) &&
                     row.grad_pred != pred_buffer.get() && row.grad_target != target_buffer.get();
        if (l1) {
          signs.go_to(unit.sample, segment, y, y == unit.begin);
          with_bool(call.pair_weights, [&](auto weighted) {
            constexpr bool W = decltype(weighted)::value;
            if (call.losses) return sign_gradient<W, true, true>(row, signs, pairs);
            call.composite ? sign_gradient<W, true, false>(row, signs, pairs)
                           : sign_gradient<W, false, false>(row, signs, pairs);
          });
        } else {
          const T* above = y > 0 ? image_row(call, rows, s, y - 1) : rows.image_beyond(s);
          const T* image = image_row(call, rows, s, y);
          const T* below = y + 1 < call.rows ? image_row(call, rows, s, y + 1) : rows.image_beyond(s);
          call.composite ? square_gradient<true>(row, above, image, below, pairs)
                         : square_gradient<false>(row, above, image, below, pairs);
        }
        store_output(call.grad_pred, call.pred_dtype, offset, n, pred_buffer.get());
        store_output(call.grad_target, call.target_dtype, offset, n, target_buffer.get());
      }
    }
  }
  end_stream(call.stream);
}

}  // namespace
}  // namespace ik::IK_ISA
