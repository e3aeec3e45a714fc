// Backward over neighbouring pixels: from the packed signs for l1, from three rows of the image for l2.
#pragma once

#include "cpu/pairs_forward.h"

namespace ik {
namespace IK_ISA {
namespace {

template <int LANES>
IK_INLINE uint32_t load_bits(const uint8_t* plane, int64_t i, int count) {
  uint32_t bits = 0;
  if (count == LANES) {
    std::memcpy(&bits, plane + i / 8, LANES / 8);
  } else {
    for (int g = 0; 8 * g < count; ++g) bits |= static_cast<uint32_t>(plane[i / 8 + g]) << (8 * g);
  }
  return bits;
}

// A plane of signs shifted by `step` elements: bit i is that of element i - step, 0 before the first.
class ShiftedBits {
 public:
  ShiftedBits(int64_t groups, int64_t step)
      : front_((step + 7) / 8), at_(8 * front_ - step), groups_(groups), bytes_(front_ + groups + 8) {
    std::memset(bytes_.get(), 0, static_cast<size_t>(front_ + groups + 8));
  }
  void set(const uint8_t* plane) { std::memcpy(bytes_.get() + front_, plane, static_cast<size_t>(groups_)); }
  IK_MEMBER uint32_t at(int64_t i) {
    uint32_t word;
    std::memcpy(&word, bytes_.get() + (at_ + i) / 8, 4);
    return word >> ((at_ + i) % 8);
  }

 private:
  int64_t front_, at_, groups_;
  Scratch<uint8_t> bytes_;
};

// The sign planes a row's l1 gradient is made of.
struct SignRows {
  const uint8_t* own;    // planes of the row, `groups` bytes each
  const uint8_t* above;  // planes 2 and 3 of the row above, zeros at the top
  int64_t groups;
  ShiftedBits* left_positive;
  ShiftedBits* left_negative;
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

// From the gradient of the image: that of pred and target.
template <bool COMPOSITE, bool LOSSES, typename T>
IK_INLINE void write_gradient(const GradientRow<T>& row, Vec<T> image, uint32_t positive, uint32_t negative,
                              int64_t i, int count) {
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
      const V pixel = V::signed_by(positive, negative, weight);
      to_pred = to_pred + pixel;
      to_target = to_target - pixel;
    }
  }
  const bool stream = row.stream && count == V::lanes;
  if (row.grad_pred)
    stream ? to_pred.stream(row.grad_pred + i) : store_part(to_pred, row.grad_pred + i, count);
  if (row.grad_target)
    stream ? to_target.stream(row.grad_target + i) : store_part(to_target, row.grad_target + i, count);
}

template <bool WEIGHTED, bool COMPOSITE, bool LOSSES, typename T>
void sign_gradient(const GradientRow<T>& row, const SignRows& signs, const PairRows<T>& pairs) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  const V down(row.down), across(row.across);
  const uint8_t* plane = signs.own;
  for_each_vector<V>(row.n, [&](int64_t i, int count) {
    const auto bits = [&](const uint8_t* from, int64_t p) {
      return load_bits<lanes>(from + p * signs.groups, i, count);
    };
    V left = across, right = across, upper = down, lower = down;
    if constexpr (WEIGHTED) {
      const V first = load_part<V>(pairs.first + i, count);
      const V second = load_part<V>(pairs.second + i, count);
      left = left * load_part<V>(pairs.first + i - row.step, count) * second;
      right = right * first * load_part<V>(pairs.second + i + row.step, count);
      upper = upper * load_part<V>(pairs.first_above + i, count) * second;
      lower = lower * first * load_part<V>(pairs.second_below + i, count);
    }
    // + the pairs that end here, - those that begin here.
    const V ends = V::signed_by(signs.left_positive->at(i), signs.left_negative->at(i), left) +
                   V::signed_by(bits(signs.above, 0), bits(signs.above, 1), upper);
    const V begins = V::signed_by(bits(plane, 0), bits(plane, 1), right) +
                     V::signed_by(bits(plane, 2), bits(plane, 3), lower);
    write_gradient<COMPOSITE, LOSSES>(row, ends - begins, LOSSES ? bits(plane, 4) : 0,
                                      LOSSES ? bits(plane, 5) : 0, i, count);
  });
}

// l2: from three rows of the image.
template <bool COMPOSITE, typename T>
void square_gradient(const GradientRow<T>& row, const T* above, const T* image, const T* below,
                     const PairRows<T>& pairs) {
  using V = Vec<T>;
  const V down(row.down + row.down), across(row.across + row.across);
  for_each_vector<V>(row.n, [&](int64_t i, int count) {
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
    write_gradient<COMPOSITE, false>(row, across * (left - right) + down * (upper - lower), 0, 0, i, count);
  });
}

template <typename T>
void backward_units(const PairCall& call, int64_t unit_begin, int64_t unit_end) {
  PairBuffers<T> rows(call);
  const int64_t groups = call.groups();
  const int64_t n = call.width;
  const bool l1 = call.penalty == Penalty::l1;
  Scratch<T> pred_buffer(n), target_buffer(n);
  Scratch<uint8_t> nothing(2 * groups);
  std::memset(nothing.get(), 0, static_cast<size_t>(2 * groups));
  ShiftedBits left_positive(groups, call.step), left_negative(groups, call.step);
  const auto output = [&](void* data, Dtype dtype, int64_t offset, T* buffer) {
    if (data == nullptr) return static_cast<T*>(nullptr);
    return dtype == kNative<T> ? static_cast<T*>(data) + offset : buffer;
  };
  const auto finish = [&](void* data, Dtype dtype, int64_t offset, const T* buffer) {
    if (data == nullptr || dtype == kNative<T>) return;
    convert_from(dtype, buffer, n, static_cast<char*>(data) + offset * dtype_bytes(dtype));
  };
  for (int64_t index = unit_begin; index < unit_end; ++index) {
    const PairUnit unit(call, index);
    rows.begin(unit);
    const PairCoefficients& c = call.coefficients[unit.sample];
    for (int64_t s = 0; s < unit.segments(); ++s) {
      const int64_t segment = unit.segment_begin + s;
      for (int64_t y = unit.row_begin; y < unit.row_end; ++y) {
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
        row.grad_pred = output(call.grad_pred, call.pred_dtype, offset, pred_buffer.get());
        row.grad_target = output(call.grad_target, call.target_dtype, offset, target_buffer.get());
        row.stream = call.stream && aligned(row.grad_pred) && aligned(row.grad_target) &&
                     row.grad_pred != pred_buffer.get() && row.grad_target != target_buffer.get();
        if (l1) {
          SignRows signs{call.sign_row(unit.sample, segment, y), nothing.get(), groups, &left_positive,
                         &left_negative};
          if (y > 0) signs.above = call.sign_row(unit.sample, segment, y - 1) + 2 * groups;
          left_positive.set(signs.own);
          left_negative.set(signs.own + groups);
          if (call.losses) {
            call.pair_weights ? sign_gradient<true, true, true>(row, signs, pairs)
                              : sign_gradient<false, true, true>(row, signs, pairs);
          } else if (call.composite) {
            call.pair_weights ? sign_gradient<true, true, false>(row, signs, pairs)
                              : sign_gradient<false, true, false>(row, signs, pairs);
          } else {
            call.pair_weights ? sign_gradient<true, false, false>(row, signs, pairs)
                              : sign_gradient<false, false, false>(row, signs, pairs);
          }
        } else {
          const T* above = y > 0 ? image_row(call, rows, s, y - 1) : rows.image_beyond(s);
          const T* image = image_row(call, rows, s, y);
          const T* below = y + 1 < call.rows ? image_row(call, rows, s, y + 1) : rows.image_beyond(s);
          call.composite ? square_gradient<true>(row, above, image, below, pairs)
                         : square_gradient<false>(row, above, image, below, pairs);
        }
        finish(call.grad_pred, call.pred_dtype, offset, pred_buffer.get());
        finish(call.grad_target, call.target_dtype, offset, target_buffer.get());
      }
    }
  }
  end_stream(call.stream);
}

}  // namespace
}  // namespace IK_ISA
}  // namespace ik
