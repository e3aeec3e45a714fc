// Forward of channel columns: seven sums over the channels of every pixel, out of which follow both norms, the weighted
// squared difference of the unit vectors and what the gradient needs of it.
#pragma once

#include "cpu/isa/columns_worker.h"

namespace ik::IK_ISA {
namespace {

// 1 / (norm + eps), 0 for a zero vector and where the mask is 0.
template <typename V>
IK_INLINE V unit_factor(V squares, V eps, V mask) {
  return select_zero_(mask, select_zero_(squares, V(1.0f) / (sqrt_(squares) + eps)));
}

// What the gradient takes away along the vector: slope * 2 (sum_c w_c d_c a_c) r^2 / |a|.
template <typename V>
IK_INLINE V along(V slope, V dot, V r, V squares) {
  return select_zero_(r, slope * dot * r * r / sqrt_(squares));
}

// Sums over the channels, with e = a - b: of a^2, b^2, w e^2, w e b, w b^2, w a^2, w a b.
enum Product { kAA, kBB, kWEE, kWEB, kWBB, kWAA, kWAB, kProducts };
// The totals of more channels than one float sum takes.
enum ForwardPlane { kTotals = kProducts, kForwardPlanes = 2 * kProducts };

template <typename V>
struct Products {
  V sums[kProducts];

  IK_MEMBER Products() {
    for (V& sum : sums) sum = V(0.0f);
  }
  IK_MEMBER void add(V a, V b, V weight) {
    const V e = a - b, we = weight * e, wa = weight * a, wb = weight * b;
    sums[kAA] = fma_(a, a, sums[kAA]), sums[kBB] = fma_(b, b, sums[kBB]);
    sums[kWEE] = fma_(we, e, sums[kWEE]), sums[kWEB] = fma_(we, b, sums[kWEB]);
    sums[kWBB] = fma_(wb, b, sums[kWBB]), sums[kWAA] = fma_(wa, a, sums[kWAA]);
    sums[kWAB] = fma_(wa, b, sums[kWAB]);
  }
};

// Sums over w of d^2, d a and d b, with d = a r - b s.
template <typename V>
struct Differences {
  V square{0.0f}, dot_a{0.0f}, dot_b{0.0f};
  V terms{0.0f};  // what `square` was added up from

  IK_MEMBER void add(V a, V b, V weight, V r, V s) {
    const V d = difference(a, r, b, s, V(0.0f) - s), weighted = weight * d;
    square = fma_(weighted, d, square);
    dot_a = fma_(weighted, a, dot_a), dot_b = fma_(weighted, b, dot_b);
  }
  IK_MEMBER void add(const Differences& other) {
    square = square + other.square, dot_a = dot_a + other.dot_a, dot_b = dot_b + other.dot_b;
  }
  // By `other` where `kept` is not positive.
  IK_MEMBER void replace(V kept, const Differences& other) {
    square = select_positive_(kept, square, other.square);
    dot_a = select_positive_(kept, dot_a, other.dot_a), dot_b = select_positive_(kept, dot_b, other.dot_b);
  }
};

// Multiplies d^2 out in one of two ways, pixel by pixel in that whose terms are smaller, for less cancels there: as
// d = e r + b (r - s), which is best for near vectors, or as it stands. Equal vectors give exactly 0.
template <typename V>
IK_INLINE Differences<V> multiplied_out(const Products<V>& products, V r, V s) {
  const auto& p = products.sums;
  const V q = r - s, rr = r * r, two(2.0f);
  const V near = rr * p[kWEE] + q * q * p[kWBB], usual = rr * p[kWAA] + s * s * p[kWBB];
  const auto either = [&](V of_near, V of_usual) __attribute__((always_inline)) {
    return select_positive_(usual - near, of_near, of_usual);
  };
  Differences<V> of;
  of.square = either(near + two * r * q * p[kWEB], usual - two * r * s * p[kWAB]);
  of.dot_a = either(r * (p[kWEE] + p[kWEB]) + q * (p[kWEB] + p[kWBB]), r * p[kWAA] - s * p[kWAB]);
  of.dot_b = either(r * p[kWEB] + q * p[kWBB], r * p[kWAB] - s * p[kWBB]);
  of.terms = either(near, usual);
  return of;
}

// Channels of a map one after the other, `step` apart. `ahead`: to what is read next but some.
template <typename S>
struct Rows {
  const S* data;
  int64_t step, ahead;
};

// Adds ROWS channels of n pixels.
template <int ROWS, typename S, typename T>
IK_NOINLINE void add_products(Rows<S> a, Rows<S> b, const T* weights, int64_t n, Planes<T> planes) {
  using V = Vec<T>;
  for_each_vector<V>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    Products<V> products;
    for (int j = 0; j < ROWS; ++j) {
      const S *x = a.data + j * a.step + i, *y = b.data + j * b.step + i;
      __builtin_prefetch(x + a.ahead), __builtin_prefetch(y + b.ahead);
      products.add(load_part<V>(x, count), load_part<V>(y, count), V(weights[j]));
    }
    for (int q = 0; q < kProducts; ++q) {
      T* to = planes.plane(q) + i;
      (V::load(to) + products.sums[q]).store(to);
    }
  });
}

template <typename T>
class Forward : Worker<T> {
  using Base = Worker<T>;
  using V = Vec<T>;
  using Base::call_;
  using Base::stride_;
  using typename Base::Block;

 public:
  explicit Forward(const ColumnsCall& call)
      : Base(call, kForwardPlanes),
        planes_{this->planes_data_.get(), stride_},
        eps_(static_cast<T>(call.eps)),
        side_(call.channels_last ? call.channels + 16 : kRows * stride_),
        converted_(2 * side_) {}

  void unit(int64_t index) {
    const Block block = this->block(index);
    for (int64_t k = 0; k < call_.predictions; ++k) {
      const int64_t sample = this->sample_of(block, k);
      std::memset(planes_.data, 0, static_cast<size_t>(kForwardPlanes * stride_) * sizeof(T));
      // Half types are converted as they are loaded, others and mixed ones row by row.
      const Dtype dtype = call_.input_dtype == call_.target_dtype ? call_.input_dtype : kNative<T>;
      with_stored(dtype, [&](auto stored) {
        using S = typename decltype(stored)::type;
        using Read = std::conditional_t<sizeof(T) == 4 && sizeof(S) == 2, S, T>;
        call_.channels_last ? add_pixels<Read>(block, sample) : add_channels<Read>(block, sample);
      });
      call_.partials[index * call_.predictions + k] = finish(block, sample);
    }
  }

 private:
  static constexpr int kRows = 4;        // channels that are added up in registers
  static constexpr int64_t kFold = 256;  // a float takes no longer sums than that without losing bits

  // `n` elements of the input's or the target's sample; converted into row `row` of the buffer unless stored as S.
  template <typename S>
  const S* elements(bool target, int64_t offset, int64_t n, int row = 0) {
    const void* data = target ? call_.target : call_.input;
    if constexpr (!std::is_same_v<S, T>)
      return static_cast<const S*>(data) + offset;
    else
      return fetch(data, dtype_of(target), offset, n,
                   converted_.get() + (target ? side_ : 0) + row * stride_);
  }
  Dtype dtype_of(bool target) const { return target ? call_.target_dtype : call_.input_dtype; }

  // channels_last: a pixel after the other.
  template <typename S>
  void add_pixels(const Block& block, int64_t sample) {
    const T* weights = this->weights_.get();
    for (int64_t p = 0; p < block.n; ++p) {
      const int64_t pixel = block.begin + p;
      const S* a = elements<S>(false, this->pixel_offset(sample, pixel), call_.channels);
      const S* b = elements<S>(true, this->pixel_offset(block.sample, pixel), call_.channels);
      Products<V> products;
      for_each_vector<V>(call_.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
        products.add(load_part<V>(a + c, count), load_part<V>(b + c, count), V::load(weights + c));
      });
      for (int q = 0; q < kProducts; ++q) planes_.plane(q)[p] = products.sums[q].lane_sum();
    }
  }

  template <typename S>
  Rows<S> rows(bool target, int64_t sample, int64_t c, int count, const Block& block) {
    const bool in_place = !std::is_same_v<S, T> || dtype_of(target) == kNative<T>;
    for (int j = in_place ? 0 : count - 1; j > 0; --j)
      elements<S>(target, this->row_offset(sample, c + j, block.begin), block.n, j);
    const S* first = elements<S>(target, this->row_offset(sample, c, block.begin), block.n);
    if (!in_place) return {first, stride_, 0};
    // As many rows as a memory access takes, more of short ones.
    return {first, call_.pixels, (least(1024 / block.n, 12) + 4) * call_.pixels};
  }

  template <typename S>
  void add_channels(const Block& block, int64_t sample) {
    for (int64_t c = 0; c < call_.channels;) {
      const int count = c + kRows <= call_.channels ? kRows : 1;
      const Rows<S> a = rows<S>(false, sample, c, count, block),
                    b = rows<S>(true, block.sample, c, count, block);
      const T* weights = this->weights_.get() + c;
      count == kRows ? add_products<kRows>(a, b, weights, block.n, planes_)
                     : add_products<1>(a, b, weights, block.n, planes_);
      c += count;
      if (call_.channels > kFold && (c % kFold == 0 || c == call_.channels)) fold(c == call_.channels);
    }
  }

  // Moves the sums to the totals; the last time the totals to the sums.
  void fold(bool last) {
    T *part = planes_.data, *total = planes_.plane(kTotals);
    for (int64_t i = 0; i < kProducts * stride_; i += V::lanes) {
      const V sum = V::load(total + i) + V::load(part + i);
      sum.store(total + i);
      (last ? sum : V(T(0))).store(part + i);
    }
  }

  // The block's sum; saves what the backward needs.
  double finish(const Block& block, int64_t sample) {
    const T* mask = this->mask_of(block, sample);
    V sum(T(0));
    for_each_vector<V>(block.n, [&](int64_t i, int count) __attribute__((always_inline)) {
      Products<V> products;
      for (int q = 0; q < kProducts; ++q) products.sums[q] = V::load(planes_.plane(q) + i);
      const V counted = mask ? load_part<V>(mask + i, count) : V(T(1));
      const V r = unit_factor(products.sums[kAA], V(eps_), counted);
      const V s = unit_factor(products.sums[kBB], V(eps_), counted);
      Differences<V> of = multiplied_out(products, r, s);
      // Not positive where more than four bits cancelled, and for NaN: there the differences themselves are added up.
      const V kept = select_zero_(r + s, V(T(16)) * of.square - of.terms);
      if (kept.negative_bits() != 0 || !all_equal_(kept, kept))
        of.replace(kept, subtracted(block, sample, i, count, r, s));
      sum = sum + first_of(select_zero_(counted, counted * of.square), count);
      if (call_.saved == nullptr) return;
      const int64_t pixel = block.begin + i;
      store_part(r, this->saved(0, sample, pixel), count);
      store_part(s, this->saved(1, sample, pixel), count);
      store_part(along(V(T(2)), of.dot_a, r, products.sums[kAA]), this->saved(2, sample, pixel), count);
      store_part(along(V(T(-2)), of.dot_b, s, products.sums[kBB]), this->saved(3, sample, pixel), count);
    });
    return sum.sum();
  }

  // The same of `count` pixels from i on, out of the differences.
  __attribute__((noinline)) Differences<V> subtracted(const Block& block, int64_t sample, int64_t i,
                                                      int count, V r, V s) {
    const T* weights = this->weights_.get();
    const int64_t pixel = block.begin + i;
    if (!call_.channels_last) {
      Differences<V> total, part;
      for (int64_t c = 0; c < call_.channels; ++c) {
        const T* a = elements<T>(false, this->row_offset(sample, c, pixel), count);
        const T* b = elements<T>(true, this->row_offset(block.sample, c, pixel), count);
        part.add(load_part<V>(a, count), load_part<V>(b, count), V(weights[c]), r, s);
        if (c % kFold == kFold - 1 || c + 1 == call_.channels) total.add(part), part = {};
      }
      return total;
    }
    T factors[2][V::lanes], sums[3][V::lanes] = {};
    r.store(factors[0]), s.store(factors[1]);
    for (int p = 0; p < count; ++p) {
      const T* a = elements<T>(false, this->pixel_offset(sample, pixel + p), call_.channels);
      const T* b = elements<T>(true, this->pixel_offset(block.sample, pixel + p), call_.channels);
      Differences<V> of;
      for_each_vector<V>(call_.channels, [&](int64_t c, int valid) __attribute__((always_inline)) {
        of.add(load_part<V>(a + c, valid), load_part<V>(b + c, valid), V::load(weights + c), V(factors[0][p]),
               V(factors[1][p]));
      });
      sums[0][p] = of.square.lane_sum(), sums[1][p] = of.dot_a.lane_sum(), sums[2][p] = of.dot_b.lane_sum();
    }
    Differences<V> found;
    found.square = V::load(sums[0]), found.dot_a = V::load(sums[1]), found.dot_b = V::load(sums[2]);
    return found;
  }

  Planes<T> planes_;
  T eps_;
  int64_t side_;  // of the buffer, before the target's part
  Scratch<T> converted_;
};

}  // namespace
}  // namespace ik::IK_ISA
