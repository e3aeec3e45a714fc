// Rows of the images, of the mask and of its region, prepared once for the segments and rows that share them.
#pragma once

#include "cpu/isa/masks.h"
#include "cpu/isa/scratch.h"
#include "cpu/pairs.h"

namespace ik::IK_ISA {

constexpr int64_t kNoRow = INT64_MIN;

// The last few rows of something, in buffers that may be read `pad` elements beyond either end: 0 is there.
template <typename T>
class RowRing {
 public:
  // At least `rows` rows, and 4, are there at a time.
  RowRing(int64_t width, int64_t pad, int64_t rows = 4)
      : pad_((pad + 15) / 16 * 16), stride_((width + 2 * pad_ + 31) / 16 * 16) {
    while (slots_ < rows) slots_ *= 2;
    rows_.resize(slots_);
    memory_.resize((slots_ + 1) * stride_);
    std::memset(memory_.get(), 0, static_cast<size_t>((slots_ + 1) * stride_) * sizeof(T));
    reset();
  }
  void reset() {
    for (int64_t i = 0; i < slots_; ++i) rows_.get()[i] = kNoRow;
  }
  // The buffer of row `y`, and whether it holds that row already.
  T* slot(int64_t y, bool& ready) {
    const int64_t at = y & (slots_ - 1);
    ready = rows_.get()[at] == y;
    rows_.get()[at] = y;
    return memory_.get() + at * stride_ + pad_;
  }
  // Beyond the image.
  const T* zeros() { return memory_.get() + slots_ * stride_ + pad_; }

 private:
  int64_t pad_, stride_;
  int64_t slots_ = 4;
  Scratch<int64_t> rows_{0};
  Scratch<T> memory_{0};
};

template <typename T>
class MaskRows {
 public:
  explicit MaskRows(const PairCall& call)
      : call_(call),
        mask_(call.mask_width, 0, kept(call)),
        weights_(call.shape.mask_repeat > 1 ? call.width : 0, 0),
        region_(call.width, call.step + 16, kept(call)),
        wide_(call.mask_width + 2 * call.mask_step + 32),
        dilated_(call.mask_width + 32),
        ones_(call.width + 2 * call.step + 64) {
    if (call.region == Region::image || call.region == Region::first_pixel) {
      // A pair that reaches over the border weighs 0.
      const int64_t end = call.width + 2 * call.step + 64;
      for (int64_t i = 0; i < end; ++i) ones_.get()[i] = T(0);
      for (int64_t i = 0; i < call.width; ++i) ones_.get()[ones_at() + i] = T(1);
    }
  }

  void begin(int64_t sample, int64_t segment) {
    sample_ = sample;
    segment_ = segment;
    mask_.reset();
    weights_.reset();
    region_.reset();
  }

  // The mask as given, in elements of its own.
  const T* mask(int64_t y) {
    const PixelShape& shape = call_.shape;
    const int64_t at = sample_ * shape.mask_stride_n + segment_ * shape.mask_stride_c + y * call_.mask_width;
    if (call_.mask_dtype == kNative<T>) return static_cast<const T*>(call_.mask) + at;
    bool ready;
    T* row = mask_.slot(y, ready);
    if (ready) return row;
    if (call_.mask_dtype == Dtype::bits) {
      const uint8_t* bits = static_cast<const uint8_t*>(call_.mask);
      unpack_bits(bits + call_.mask_bits_row(sample_, segment_, y), call_.mask_width, row);
      return row;
    }
    convert_to(call_.mask_dtype, static_cast<const char*>(call_.mask) + at * dtype_bytes(call_.mask_dtype),
               call_.mask_width, row);
    return row;
  }

  // The mask of every element of an image's row.
  const T* weights(int64_t y) {
    if (call_.shape.mask_repeat == 1) return mask(y);
    bool ready;
    T* row = weights_.slot(y, ready);
    if (!ready) repeat_each(mask(y), call_.mask_width, call_.shape.mask_repeat, row);
    return row;
  }

  // Weight of a pair = first(y)[i] * second(next row or pixel); both 0 beyond the image.
  const T* first(int64_t y) {
    if (y < 0 || y >= call_.rows) return region_.zeros();
    return call_.region == Region::image ? ones_.get() + ones_at() : region(y);
  }
  const T* second(int64_t y) {
    if (y < 0 || y >= call_.rows) return region_.zeros();
    return call_.region == Region::image || call_.region == Region::first_pixel ? ones_.get() + ones_at()
                                                                                : region(y);
  }

  const T* region(int64_t y) {
    bool ready;
    T* row = region_.slot(y, ready);
    if (ready) return row;
    const int64_t repeat = call_.shape.mask_repeat;
    T* values = repeat == 1 ? row : dilated_.get();
    call_.region == Region::dilated_hole ? dilate(y, values) : hole(mask(y), values);
    if (repeat > 1) repeat_each(values, call_.mask_width, repeat, row);
    return row;
  }

 private:
  using V = Vec<T>;

  // The rows of a unit and those around them, if several segments want them.
  static int64_t kept(const PairCall& call) {
    return call.shape.mask_stride_c == 0 && call.shape.segments > 1 ? least(call.unit_rows(), call.rows) + 4
                                                                    : 4;
  }
  int64_t ones_at() const { return call_.step + 16; }

  void hole(const T* mask, T* out) {
    const V one(T(1));
    for_each_vector<V>(call_.mask_width, [&](int64_t i, int count) {
      const V m = load_part<V>(mask + i, count);
      store_part(call_.mask_is_hole ? m : one - m, out + i, count);
    });
  }

  // Maximum of the hole over the 3x3 neighbourhood, as far as it lies within the image.
  void dilate(int64_t y, T* out) {
    const T* here = mask(y);
    const T* above = y > 0 ? mask(y - 1) : here;
    const T* below = y + 1 < call_.rows ? mask(y + 1) : here;
    const V one(T(1));
    T* middle = wide_.get() + call_.mask_step;
    for (int64_t i = 1; i <= call_.mask_step; ++i) middle[-i] = middle[call_.mask_width + i - 1] = -INFINITY;
    for_each_vector<V>(call_.mask_width, [&](int64_t i, int count) {
      prefetch(below + i);
      V a = load_part<V>(above + i, count), b = load_part<V>(here + i, count),
        c = load_part<V>(below + i, count);
      if (!call_.mask_is_hole) a = one - a, b = one - b, c = one - c;
      store_part(max_(max_(a, b), c), middle + i, count);
    });
    for_each_vector<V>(call_.mask_width, [&](int64_t i, int count) {
      const V left = load_part<V>(middle + i - call_.mask_step, count);
      const V right = load_part<V>(middle + i + call_.mask_step, count);
      store_part(max_(max_(left, load_part<V>(middle + i, count)), right), out + i, count);
    });
  }

  const PairCall& call_;
  int64_t sample_ = 0, segment_ = 0;
  RowRing<T> mask_, weights_, region_;
  Scratch<T> wide_, dilated_, ones_;
};

}  // namespace ik::IK_ISA
