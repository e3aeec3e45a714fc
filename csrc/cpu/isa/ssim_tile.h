// A tile of one plane: its rows, and their sums over windows.
//
// From s = pred + target and d = pred - target four sums give all of SSIM, where the two images need five:
// mx my = (ms^2 - md^2) / 4, mx^2 + my^2 = (ms^2 + md^2) / 2, and so for the covariance and the variances. Equal
// images have d = 0, and so exactly the value 1 and no gradient. A value near the mean of the tile is subtracted from
// s, which takes most of what would cancel in E[s^2] - ms^2.
#pragma once

#include "cpu/isa/ssim_blur.h"

namespace ik::IK_ISA {
namespace {

// Rows in memory at a time: a block of kRows, the windows below it, and those of the gradient's windows.
constexpr int64_t kRing = 24;
// So many rows before they are read, rows are fetched into the cache: their part in a tile is too short for the
// processor to see where the next one is.
constexpr int64_t kAhead = 8;

IK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename T>
T element(const StridedImage& image, int64_t offset) {
  return with_stored(image.dtype, [&](auto stored) {
    using S = typename decltype(stored)::type;
    return static_cast<T>(load_one(static_cast<const S*>(image.data) + offset));
  });
}

// Calls f with the distance of two pixels; as a constant, of which compilers make vectors, for three channels.
template <typename F>
IK_INLINE void with_step(int64_t step, const F& f) {
  step == 3 ? f(std::integral_constant<int64_t, 3>()) : f(step);
}

// `n` elements of a row: in place if they are stored as T side by side, else in `buffer`.
template <typename T>
const T* row_at(const StridedImage& image, int64_t offset, int64_t n, T* buffer) {
  if (image.stride_x == 1) return fetch(image.data, image.dtype, offset, n, buffer);
  with_stored(image.dtype, [&](auto stored) {
    using S = typename decltype(stored)::type;
    const S* from = static_cast<const S*>(image.data) + offset;
    with_step(image.stride_x, [&](auto step) {
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(load_one(from + i * step));
    });
  });
  return buffer;
}

template <typename T>
void store_row(const StridedImage& image, int64_t offset, int64_t n, const T* row) {
  if (image.stride_x == 1) {
    return convert_from(image.dtype, row, n,
                        static_cast<char*>(image.data) + offset * dtype_bytes(image.dtype));
  }
  with_stored(image.dtype, [&](auto stored) {
    using S = typename decltype(stored)::type;
    S* to = static_cast<S*>(image.data) + offset;
    with_step(image.stride_x, [&](auto step) {
      for (int64_t i = 0; i < n; ++i) store_as(row[i], to + i * step);
    });
  });
}

// Means and variances of s and d in a window, and the fractions that are luminance and contrast: n1 / d1, n2 / d2.
template <typename V>
struct Window {
  V mean_s, ms, md, vs, vd;  // mean_s: of s without what was subtracted
  V n1, d1, n2, d2;
};

template <typename T>
class Tile {
 public:
  using V = Vec<T>;

  // `reach`: how far beyond a tile its windows are summed; the radius for the gradient, else 0.
  Tile(const SsimCall& call, int64_t reach)
      : call_(call),
        blur_(blur_of<T>(call.radius)),
        radius_(call.radius),
        reach_(reach),
        stride_((call.tile_width() + 2 * (reach + call.radius) + 47) / 16 * 16),
        rows_((6 * kRing + 4 * kRows + 6) * stride_) {
    for (int k = 0; k <= call.radius; ++k) weights_[k] = static_cast<T>(call.weights[k]);
    T* at = rows_.get();
    for (int64_t i = 0; i < (6 * kRing + 4 * kRows + 6) * stride_; ++i) at[i] = T(0);
    s_ = at, at += kRing * stride_;
    d_ = at, at += kRing * stride_;
    for (T*& ring : sums_) ring = at, at += kRing * stride_;
    for (T*& block : blocks_) block = at, at += kRows * stride_;
    for (T*& buffer : buffers_) buffer = at, at += stride_;
    mask_ = inverse_ = s_;  // not read without a mask
    if (call.mask.data == nullptr) return;
    const int64_t size = (call.tile_height() + 2 * (reach + radius_) + kRows) * stride_;
    masks_.resize(3 * size);
    mask_ = masks_.get();
    for (int64_t i = 0; i < 3 * size; ++i) mask_[i] = T(0);
    inverse_ = mask_ + size;
    mask_sums_ = inverse_ + size;
  }

  // Goes to a unit of the call.
  void begin(int64_t unit) {
    const int64_t tile = unit % (call_.rows_of_tiles() * call_.columns_of_tiles());
    const int64_t group = unit / (call_.rows_of_tiles() * call_.columns_of_tiles());
    sample = group / (call_.channels / call_.unit_channels());
    first_channel = group % (call_.channels / call_.unit_channels()) * call_.unit_channels();
    y0 = tile / call_.columns_of_tiles() * call_.tile_height();
    x0 = tile % call_.columns_of_tiles() * call_.tile_width();
    y1 = least(y0 + call_.tile_height(), call_.height);
    x1 = least(x0 + call_.tile_width(), call_.width);
    const int64_t edge = reach_ + radius_;
    top_ = y0 - edge;
    left = x0 - edge, bottom_ = y1 + edge;
    int64_t right = x1 + edge;
    first_row = top_;
    if (!call_.same) {  // no window reaches beyond the image
      left = most(left, 0), right = least(right, call_.width);
      first_row = most(top_, 0), bottom_ = least(bottom_, call_.height);
    }
    width_ = right - left;
    windows = most(width_ - 2 * radius_, 0);
    const int64_t border = call_.same ? 0 : radius_;
    window_y0 = most(y0 - reach_, border);
    window_y1 = least(y1 + reach_, call_.height - border);
    window_x0 = most(x0 - reach_, border);
    window_x1 = least(x1 + reach_, call_.width - border);
  }

  // Goes to a channel of it. Returns whether anything counts there.
  bool begin_channel(int64_t c) {
    channel = c;
    if (call_.mask.data != nullptr && (c == first_channel || call_.mask.stride_c != 0)) sum_mask();
    if (masked && nothing_) return false;
    find_pivot();
    next_row_ = first_row;
    return true;
  }

  // Reads rows and sums their windows across, up to row `end`. Calls `seen(y, s, d)` for each.
  template <typename F>
  void read_to(int64_t end, const F& seen) {
    for (end = least(end, bottom_); next_row_ < end; ++next_row_) {
      read(next_row_);
      seen(next_row_);
    }
  }

  // Sums the windows with centres in kRows rows from `y` on: block(0) to block(3), a row of `windows` at a time.
  void sum_rows(int64_t y) {
    const T* rows[kRows + 2 * kMaxRadius];
    for (int q = 0; q < 4; ++q) {
      for (int64_t j = 0; j < kRows + 2 * radius_; ++j) rows[j] = sums_[q] + slot(y - radius_ + j);
      blur_.down(rows, weights_, windows, blocks_[q], stride_);
    }
  }

  // Window `x` of row `i` of the block that begins at row `y`.
  template <bool MASKED>
  IK_MEMBER Window<V> window(int64_t y, int64_t i, int64_t x) const {
    Window<V> w;
    const int64_t at = i * stride_ + x;
    w.mean_s = V::load(blocks_[0] + at), w.md = V::load(blocks_[1] + at);
    V ss = V::load(blocks_[2] + at), dd = V::load(blocks_[3] + at);
    if constexpr (MASKED) {
      const V inverse = V::load(inverse_row(y + i) + x);
      w.mean_s = w.mean_s * inverse, w.md = w.md * inverse;
      ss = ss * inverse, dd = dd * inverse;
    }
    const V zero(T(0)), half(T(0.5)), c1(static_cast<T>(call_.c1)), c2(static_cast<T>(call_.c2));
    w.ms = w.mean_s + V(pivot);
    // Rounding must not make a variance negative, which would let |contrast| exceed 1; NaN stays.
    w.vs = max_(zero, ss - w.mean_s * w.mean_s), w.vd = max_(zero, dd - w.md * w.md);
    const V ms2 = w.ms * w.ms, md2 = w.md * w.md;
    w.n1 = fma_(half, ms2 - md2, c1), w.d1 = fma_(half, ms2 + md2, c1);
    w.n2 = fma_(half, w.vs - w.vd, c2), w.d2 = fma_(half, w.vs + w.vd, c2);
    return w;
  }

  // Rows of the tile as read, from column `left` on.
  const T* s_row(int64_t y) const { return s_ + slot(y); }
  const T* d_row(int64_t y) const { return d_ + slot(y); }
  const T* mask_row(int64_t y) const { return mask_ + (y - top_) * stride_; }
  const T* inverse_row(int64_t y) const { return inverse_ + (y - top_) * stride_; }
  const Blur<T>& blur() const { return blur_; }
  const T* weights() const { return weights_; }
  int64_t stride() const { return stride_; }

  int64_t sample = 0, channel = 0, first_channel = 0;
  int64_t y0 = 0, y1 = 0, x0 = 0, x1 = 0;  // the tile
  int64_t first_row = 0, left = 0;         // of what is read
  // Centres of windows that there are: of those of the tile, or that reach into it. A row of sums begins at the
  // window around column left + radius and has `windows` of them.
  int64_t window_y0 = 0, window_y1 = 0, window_x0 = 0, window_x1 = 0, windows = 0;
  bool masked = false;  // else all weights are 1
  T pivot = 0;          // what was subtracted from s

 private:
  int64_t slot(int64_t y) const { return (y - top_) % kRing * stride_; }

  // The columns of a row that lie in the image: from `begin` of what is read on.
  void inside(int64_t& begin, int64_t& count) const {
    begin = most(-left, 0);
    count = least(left + width_, call_.width) - (left + begin);
  }

  // The mask of the tile, and 1 over its sums over windows.
  void sum_mask() {
    int64_t begin, count;
    inside(begin, count);
    V ones(T(0)), sum(T(0));
    bool whole = count == width_;
    for (int64_t y = top_; y < bottom_; ++y) {
      T* row = mask_ + (y - top_) * stride_;
      for (int64_t i = 0; i < stride_; ++i) row[i] = T(0);
      if (y < 0 || y >= call_.height) {
        whole = whole && y < first_row;
        continue;
      }
      const int64_t at = call_.mask.offset(sample, channel, y, left + begin);
      const T* from = row_at(call_.mask, at, count, buffers_[0]);
      for_each_vector<V>(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const V m = load_part<V>(from + i, lanes);
        store_part(m, row + begin + i, lanes);
        sum = sum + m;
        ones = ones + first_of(abs_(V(T(1)) - m), lanes);
      });
    }
    nothing_ = sum.sum() == 0;
    masked = !(whole && ones.sum() == 0);
    if (!masked || nothing_) return;
    const int64_t rows = bottom_ - top_;
    for (int64_t y = 0; y < rows; ++y) {
      blur_.across(mask_ + y * stride_ + radius_, weights_, windows, mask_sums_ + y * stride_);
    }
    for (int64_t y = radius_; y < rows - radius_; y += kRows) {
      const T* from[kRows + 2 * kMaxRadius];
      for (int64_t j = 0; j < kRows + 2 * radius_; ++j) from[j] = mask_sums_ + (y - radius_ + j) * stride_;
      blur_.down(from, weights_, windows, inverse_ + y * stride_, stride_);
    }
    // A window whose sum is 0 has no centre that counts.
    const V one(T(1)), tiny(T(1e-37));
    for (int64_t i = 0; i < rows * stride_; i += V::lanes) {
      const V total = V::load(inverse_ + i);
      select_positive_(total - tiny, one / total, V(T(0))).store(inverse_ + i);
    }
  }

  // The mean of pred + target over 8 x 8 counted pixels of the tile. Of values within the data range alone: others are
  // rare, and would move the rest away from 0.
  void find_pivot() {
    const T limit = static_cast<T>(200 * std::sqrt(call_.c1));
    T sum = 0;
    int count = 0;
    for (int i = 0; i < 64; ++i) {
      const int64_t y = y0 + (2 * (i / 8) + 1) * (y1 - y0) / 16, x = x0 + (2 * (i % 8) + 1) * (x1 - x0) / 16;
      if (masked && mask_row(y)[x - left] == T(0)) continue;
      const T value = element<T>(call_.pred, call_.pred.offset(sample, channel, y, x)) +
                      element<T>(call_.target, call_.target.offset(sample, channel, y, x));
      if (!(std::fabs(value) <= limit)) continue;  // NaN, too
      sum += value;
      ++count;
    }
    pivot = count > 0 ? sum / static_cast<T>(count) : T(0);
  }

  void read(int64_t y) {
    T *s = s_ + slot(y), *d = d_ + slot(y);
    const V shift(pivot);
    int64_t begin, count;
    inside(begin, count);
    if (y < 0 || y >= call_.height) begin = width_, count = 0;
    // Zeros outside the image.
    if (count < width_) {
      for (int64_t i = 0; i < width_; ++i) s[i] = -pivot, d[i] = T(0);
    }
    if (count > 0) {
      const int64_t x = left + begin;
      const int64_t below = least(y + kAhead, call_.height - 1);
      const char *p_ahead = call_.pred.address(sample, channel, below, x),
                 *t_ahead = call_.target.address(sample, channel, below, x);
      const int64_t p_step = call_.pred.bytes_x(), t_step = call_.target.bytes_x();
      const T* p = row_at(call_.pred, call_.pred.offset(sample, channel, y, x), count, buffers_[0]);
      const T* t = row_at(call_.target, call_.target.offset(sample, channel, y, x), count, buffers_[1]);
      for_each_vector<V>(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        __builtin_prefetch(p_ahead + i * p_step, 0, 2), __builtin_prefetch(t_ahead + i * t_step, 0, 2);
        const V a = load_part<V>(p + i, lanes), b = load_part<V>(t + i, lanes);
        store_part((a + b) - shift, s + begin + i, lanes);
        store_part(a - b, d + begin + i, lanes);
      });
    }
    T* sums[4];
    for (int q = 0; q < 4; ++q) sums[q] = sums_[q] + slot(y);
    if (!masked) return blur_.moments(s + radius_, d + radius_, weights_, windows, sums);
    const T* mask = mask_row(y);
    for (int64_t i = 0; i < width_; i += V::lanes) {
      const V m = V::load(mask + i);
      const V a = select_zero_(m, V::load(s + i)), b = select_zero_(m, V::load(d + i));
      const V ma = m * a, mb = m * b;
      a.store(s + i), b.store(d + i);
      ma.store(buffers_[2] + i), mb.store(buffers_[3] + i);
      (ma * a).store(buffers_[4] + i), (mb * b).store(buffers_[5] + i);
    }
    for (int q = 0; q < 4; ++q) blur_.across(buffers_[2 + q] + radius_, weights_, windows, sums[q]);
  }

  const SsimCall& call_;
  const Blur<T> blur_;
  const int64_t radius_, reach_, stride_;
  T weights_[kMaxRadius + 1] = {};
  int64_t top_ = 0, bottom_ = 0, width_ = 0, next_row_ = 0;
  bool nothing_ = false;
  Scratch<T> rows_;
  Scratch<T> masks_{0};
  T *s_, *d_, *sums_[4], *blocks_[4], *buffers_[6];
  T *mask_ = nullptr, *inverse_ = nullptr, *mask_sums_ = nullptr;
};

}  // namespace
}  // namespace ik::IK_ISA
