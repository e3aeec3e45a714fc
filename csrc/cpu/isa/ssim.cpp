// CPU kernels of SSIM: sums over windows, forward; the same sums anew and those of the gradient, backward.
//
// Tile by tile, a few rows at a time: a row is read, its windows are summed across, eight rows of windows are summed
// down, and what they give is added up (forward), or summed over the windows of the gradient (backward), while all of
// it lies in the second-level cache. Per pixel and window of 11: forward 4 sums of 22 weights, backward 7 for one image.
#include "cpu/isa/ssim_tile.h"

namespace ik::IK_ISA {
namespace {

template <bool MASKED, bool CONTRAST, typename T>
void add_windows(const SsimCall& call, const Tile<T>& tile, int64_t y, SsimSums& sums) {
  using V = Vec<T>;
  for (int64_t i = 0; i < kRows && y + i < tile.window_y1; ++i) {
    const T* mask = tile.mask_row(y + i) + call.radius;
    V similarity(T(0)), contrast(T(0)), weight(T(0));
    for_each_vector<V>(tile.windows, [&](int64_t x, int count) __attribute__((always_inline)) {
      const Window<V> w = tile.template window<MASKED>(y, i, x);
      // Fractions and not products with an inverse: what is equal gives exactly 1.
      V cs = w.n2 / w.d2;
      V value = w.n1 / w.d1 * cs;
      if constexpr (MASKED) {
        const V m = V::load(mask + x);
        value = select_zero_(m, m * value);
        if constexpr (CONTRAST) cs = select_zero_(m, m * cs);
        weight = weight + first_of(m, count);
      }
      similarity = similarity + first_of(value, count);
      if constexpr (CONTRAST) contrast = contrast + first_of(cs, count);
    });
    sums.similarity += similarity.sum();
    sums.contrast += contrast.sum();
    sums.windows += MASKED ? weight.sum() : static_cast<double>(tile.windows);
  }
}

// |pred - target| of a row of the tile.
template <typename T>
void add_distances(const Tile<T>& tile, int64_t y, SsimSums& sums) {
  using V = Vec<T>;
  const T *d = tile.d_row(y) + (tile.x0 - tile.left), *mask = tile.mask_row(y) + (tile.x0 - tile.left);
  V distance(T(0)), weight(T(0));
  for_each_vector<V>(tile.x1 - tile.x0, [&](int64_t x, int count) __attribute__((always_inline)) {
    V value = abs_(load_part<V>(d + x, count));
    if (tile.masked) {
      const V m = load_part<V>(mask + x, count);
      value = m * value;
      weight = weight + m;
    }
    distance = distance + value;
  });
  sums.l1 += distance.sum();
  sums.pixels += tile.masked ? weight.sum() : static_cast<double>(tile.x1 - tile.x0);
}

template <typename T>
void forward_units(const SsimCall& call, int64_t unit_begin, int64_t unit_end) {
  Tile<T> tile(call, 0);
  const int64_t channels = call.unit_channels();
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    tile.begin(unit);
    for (int64_t c = 0; c < channels; ++c) {
      SsimSums& sums = call.sums[unit * channels + c];
      if (!tile.begin_channel(tile.first_channel + c)) continue;
      const auto seen = [&](int64_t y) {
        if (call.l1 && y >= tile.y0 && y < tile.y1) add_distances(tile, y, sums);
      };
      for (int64_t y = tile.window_y0; y < tile.window_y1 && tile.windows > 0; y += kRows) {
        tile.read_to(y + kRows + call.radius, seen);
        tile.sum_rows(y);
        with_bool(tile.masked, [&](auto masked) {
          with_bool(call.contrast, [&](auto contrast) {
            add_windows<decltype(masked)::value, decltype(contrast)::value>(call, tile, y, sums);
          });
        });
      }
      tile.read_to(tile.y1, seen);
    }
  }
}

// What windows send to the pixels q they see: w (A + 2 s_q B) to s and w (C + 2 d_q D) to d, w the window's weight
// at q. To one image alone goes their sum or difference, for which A and C are one.
template <typename T>
class Gradient {
 public:
  using V = Vec<T>;

  Gradient(const SsimCall& call, Tile<T>& tile)
      : call_(call),
        tile_(tile),
        both_(call.grad_pred.data != nullptr && call.grad_target.data != nullptr),
        sign_(call.grad_pred.data != nullptr ? 1 : -1),
        sums_(both_ ? 4 : 3),
        stride_(tile.stride()),
        memory_((kRing + kRows + 1) * 4 * stride_ + 2 * stride_) {
    T* at = memory_.get();
    for (T*& ring : rings_) ring = at, at += kRing * stride_;
    for (T*& block : blocks_) block = at, at += kRows * stride_;
    for (T*& row : rows_) row = at, at += stride_;
    for (T*& row : results_) row = at, at += stride_;
  }

  void run() {
    const int64_t reach = call_.radius;
    const SsimCoefficients& c = call_.coefficients[tile_.sample * call_.channels + tile_.channel];
    for (T* row : rows_) {
      for (int64_t i = 0; i < stride_; ++i) row[i] = T(0);
    }
    int64_t written = tile_.y0;
    for (int64_t y = tile_.y0 - reach; written < tile_.y1; y += kRows) {
      tile_.read_to(y + kRows + reach, [](int64_t) {});
      const bool any = tile_.windows > 0 && y < tile_.window_y1 && y + kRows > tile_.window_y0;
      if (any) tile_.sum_rows(y);
      for (int64_t i = 0; i < kRows; ++i) {
        if (any && y + i >= tile_.window_y0 && y + i < tile_.window_y1) {
          with_bool(tile_.masked, [&](auto masked) { add_row<decltype(masked)::value>(c, y, i); });
        } else {
          for (int q = 0; q < sums_; ++q) {
            for (int64_t x = 0; x < stride_; ++x) rings_[q][slot(y + i) + x] = T(0);
          }
        }
      }
      for (; written < tile_.y1 && written + reach <= y; written += kRows) write(c, written);
    }
  }

  // Of a tile without a counted pixel.
  void write_zeros() {
    for (int64_t i = 0; i < tile_.x1 - tile_.x0; ++i) results_[0][i] = T(0);
    const StridedImage* images[2] = {&call_.grad_pred, &call_.grad_target};
    for (const StridedImage* image : images) {
      if (image->data == nullptr) continue;
      for (int64_t y = tile_.y0; y < tile_.y1; ++y) {
        store_row(*image, image->offset(tile_.sample, tile_.channel, y, tile_.x0), tile_.x1 - tile_.x0,
                  results_[0]);
      }
    }
  }

 private:
  int64_t slot(int64_t y) const { return (y - tile_.y0 + call_.radius) % kRing * stride_; }

  // A, B and so on of row `i` of the block of windows that begins at row `y`, summed across.
  template <bool MASKED>
  void add_row(const SsimCoefficients& c, int64_t y, int64_t i) {
    const int64_t from = tile_.window_x0 - tile_.left - call_.radius;  // in rows of sums
    const int64_t to = tile_.window_x0 - tile_.x0 + call_.radius;      // in rows_
    const T* mask = tile_.mask_row(y + i) + tile_.window_x0 - tile_.left;
    const V c1(static_cast<T>(2 * call_.c1)), c2(static_cast<T>(2 * call_.c2)), zero(T(0)), two(T(2));
    const V of_similarity(static_cast<T>(c.similarity)), of_contrast(static_cast<T>(c.contrast));
    const V sign(static_cast<T>(sign_)), half(T(0.5)), one(T(1));
    for_each_vector<V>(tile_.window_x1 - tile_.window_x0,
                       [&](int64_t x, int count) __attribute__((always_inline)) {
                         const Window<V> w = tile_.template window<MASKED>(y, i, from + x);
                         V similarity = of_similarity, contrast = of_contrast, inverse = one;
                         if constexpr (MASKED) {
                           const V m = V::load(mask + x);
                           inverse = V::load(tile_.inverse_row(y + i) + from + x) * m;
                         }
                         // 1 - l = md^2 / d1, 1 + l = (ms^2 + 2 c1) / d1, and likewise for the contrast: no difference of near values.
                         const V of_d1 = one / w.d1, of_d2 = one / w.d2;
                         const V to_mean = similarity * (w.n2 * of_d2) * of_d1 * (w.md * of_d1);
                         const V to_variance = half * fma_(similarity, w.n1 * of_d1, contrast) * of_d2;
                         V b = to_variance * (w.vd * of_d2);
                         V d = zero - to_variance * ((w.vs + c2) * of_d2);
                         V a = to_mean * (w.md * w.ms) - two * w.mean_s * b;
                         V e = zero - to_mean * fma_(w.ms, w.ms, c1) - two * w.md * d;
                         if constexpr (MASKED) {
                           a = select_zero_(inverse, a * inverse), b = select_zero_(inverse, b * inverse);
                           e = select_zero_(inverse, e * inverse), d = select_zero_(inverse, d * inverse);
                         }
                         if (both_) {
                           store_part(e, rows_[3] + to + x, count);
                         } else {
                           a = fma_(sign, e, a), d = sign * d;
                         }
                         store_part(a, rows_[0] + to + x, count);
                         store_part(b, rows_[1] + to + x, count);
                         store_part(d, rows_[2] + to + x, count);
                       });
    for (int q = 0; q < sums_; ++q) {
      tile_.blur().across(rows_[q] + call_.radius, tile_.weights(), tile_.x1 - tile_.x0,
                          rings_[q] + slot(y + i));
    }
  }

  // The gradients of kRows rows of the tile from `y` on.
  void write(const SsimCoefficients& c, int64_t y) {
    const T* rows[kRows + 2 * kMaxRadius];
    const int64_t n = tile_.x1 - tile_.x0;
    for (int q = 0; q < sums_; ++q) {
      for (int64_t j = 0; j < kRows + 2 * call_.radius; ++j) rows[j] = rings_[q] + slot(y - call_.radius + j);
      tile_.blur().down(rows, tile_.weights(), n, blocks_[q], stride_);
    }
    for (int64_t i = 0; i < kRows && y + i < tile_.y1; ++i) {
      T* results[2];
      const StridedImage* images[2] = {&call_.grad_pred, &call_.grad_target};
      int64_t offsets[2];
      for (int k = 0; k < 2; ++k) {
        const StridedImage& image = *images[k];
        offsets[k] = image.offset(tile_.sample, tile_.channel, y + i, tile_.x0);
        const bool direct = image.data != nullptr && image.dtype == kNative<T> && image.stride_x == 1;
        results[k] = image.data == nullptr ? nullptr
                     : direct              ? static_cast<T*>(image.data) + offsets[k]
                                           : results_[k];
      }
      with_bool(tile_.masked, [&](auto masked) {
        with_bool(c.l1 != 0, [&](auto l1) {
          constexpr bool M = decltype(masked)::value, L = decltype(l1)::value;
          both_ ? write_row<M, L, true>(c, y, i, results[0], results[1])
                : write_row<M, L, false>(c, y, i, results[sign_ > 0 ? 0 : 1], nullptr);
        });
      });
      for (int k = 0; k < 2; ++k) {
        if (results[k] == results_[k]) store_row(*images[k], offsets[k], n, results_[k]);
      }
    }
  }

  // BOTH: to pred and to target, else to the one image.
  template <bool MASKED, bool L1, bool BOTH>
  void write_row(const SsimCoefficients& c, int64_t y, int64_t i, T* to_first, T* to_target) {
    const int64_t from = tile_.x0 - tile_.left;
    const T *s = tile_.s_row(y + i) + from, *d = tile_.d_row(y + i) + from,
            *mask = tile_.mask_row(y + i) + from;
    const T* block[4];
    for (int q = 0; q < 4; ++q) block[q] = blocks_[q] + i * stride_;
    const V two(T(2)), distance(static_cast<T>(sign_ * c.l1));
    for_each_vector<V>(tile_.x1 - tile_.x0, [&](int64_t x, int count) __attribute__((always_inline)) {
      const V ds = two * V::load(s + x), dd = two * V::load(d + x);
      V first = fma_(ds, V::load(block[1] + x), V::load(block[0] + x));
      V second = dd * V::load(block[2] + x);
      if constexpr (L1) second = second + V::signed_by(dd.positive_bits(), dd.negative_bits(), distance);
      if constexpr (BOTH) second = second + V::load(block[3] + x);
      V to = first + second, other = first - second;
      if constexpr (MASKED) {
        const V m = V::load(mask + x);
        to = select_zero_(m, m * to), other = select_zero_(m, m * other);
      }
      store_part(to, to_first + x, count);
      if constexpr (BOTH) store_part(other, to_target + x, count);
    });
  }

  const SsimCall& call_;
  Tile<T>& tile_;
  const bool both_;
  const int sign_, sums_;
  const int64_t stride_;
  Scratch<T> memory_;
  T *rings_[4], *blocks_[4], *rows_[4], *results_[2];
};

template <typename T>
void backward_units(const SsimCall& call, int64_t unit_begin, int64_t unit_end) {
  Tile<T> tile(call, call.radius);
  Gradient<T> gradient(call, tile);
  const int64_t channels = call.unit_channels();
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    tile.begin(unit);
    for (int64_t c = 0; c < channels; ++c) {
      tile.begin_channel(tile.first_channel + c) ? gradient.run() : gradient.write_zeros();
    }
  }
}

}  // namespace

template <typename T>
constexpr Kernels<SsimCall> kKernels = {forward_units<T>, backward_units<T>};
IK_DEFINE_PER_ISA(Kernels<SsimCall>, ssim_kernels, kKernels)

}  // namespace ik::IK_ISA
