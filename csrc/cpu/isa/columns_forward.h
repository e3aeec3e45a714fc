// Forward of channel columns: norms of a block of pixels, then the weighted squared differences of unit vectors.
#pragma once

#include "cpu/isa/columns_worker.h"

namespace ik::IK_ISA {
namespace {

// Rows of one block in NCHW, one for each channel.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  const T* row(int64_t c) const { return data + c * stride; }
};

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

// squares[i] += ROWS squares of column i. COPY: the rows also go to `to`. What lies `ahead` of them is fetched.
template <int ROWS, bool COPY, typename T>
IK_NOINLINE void add_squares(Rows<T> rows, int64_t n, T* to, int64_t to_stride, T* squares, int64_t ahead) {
  using V = Vec<T>;
  for_each_vector<V>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    V sum(T(0));
    for (int j = 0; j < ROWS; ++j) {
      const V x = load_part<V>(rows.row(j) + i, count);
      if constexpr (COPY) {
        x.store(to + j * to_stride + i);
      }
      __builtin_prefetch(rows.row(j) + ahead + i);
      sum = fma_(x, x, sum);
    }
    (V::load(squares + i) + sum).store(squares + i);
  });
}

// kTotals: as many as there are sums from kSum on, 0 but while channels are folded.
enum ForwardPlane {
  kSquaresA,
  kSquaresB,
  kUnitA,
  kUnitB,
  kSum,
  kDotA,
  kDotB,
  kTotals,
  kForwardPlanes = kTotals + 3
};

// Adds ROWS channels' w d^2 to the sums and, if DOTS, w d a and w d b to the products.
template <int ROWS, bool DOTS, typename T>
IK_NOINLINE void add_differences(Rows<T> a, Rows<T> b, const T* weights, int64_t n, Planes<T> planes) {
  using V = Vec<T>;
  for_each_vector<V>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    const V r = V::load(planes.plane(kUnitA) + i), s = V::load(planes.plane(kUnitB) + i);
    const V minus_s = V(T(0)) - s;
    V sum(T(0)), dot_a(T(0)), dot_b(T(0));
    for (int j = 0; j < ROWS; ++j) {
      const V x = load_part<V>(a.row(j) + i, count), y = load_part<V>(b.row(j) + i, count);
      const V d = difference(x, r, y, s, minus_s);
      const V weighted = V(weights[j]) * d;
      sum = fma_(weighted, d, sum);
      if constexpr (DOTS) {
        dot_a = fma_(weighted, x, dot_a);
        dot_b = fma_(weighted, y, dot_b);
      }
    }
    const auto add = [&](int plane, V value) __attribute__((always_inline)) {
      (V::load(planes.plane(plane) + i) + value).store(planes.plane(plane) + i);
    };
    add(kSum, sum);
    if constexpr (DOTS) {
      add(kDotA, dot_a);
      add(kDotB, dot_b);
    }
  });
}

// Calls f<ROWS>(first) for the channels in groups of four, then one by one, and fold(last) after each kFold of them: a
// float takes no longer sums than that without losing bits. Fewer channels need no folding.
constexpr int64_t kFold = 256;
template <typename F, typename G>
IK_INLINE void for_each_group(int64_t channels, F&& f, G&& fold) {
  for (int64_t first = 0; first < channels; first += kFold) {
    const int64_t end = least(first + kFold, channels);
    int64_t c = first;
    for (; c + 4 <= end; c += 4) f(std::integral_constant<int, 4>(), c);
    for (; c < end; ++c) f(std::integral_constant<int, 1>(), c);
    if (channels > kFold) fold(end == channels);
  }
}

// total += part, and part begins anew; the last time the sum goes to part.
template <typename T>
IK_NOINLINE void fold_plane(T* part, T* total, int64_t n, bool last) {
  using V = Vec<T>;
  for (int64_t i = 0; i < n; i += V::lanes) {
    const V sum = V::load(total + i) + V::load(part + i);
    (last ? V(T(0)) : sum).store(total + i);
    (last ? sum : V(T(0))).store(part + i);
  }
}

template <typename T>
T square_sum(const T* x, int64_t n) {
  using V = Vec<T>;
  V sum(T(0));
  for_each_vector<V>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    const V value = load_part<V>(x + i, count);
    sum = fma_(value, value, sum);
  });
  return sum.lane_sum();
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
        input_(scratch_of(call.input_dtype)),
        target_(scratch_of(call.target_dtype)) {
    for (int plane = kTotals; plane < kForwardPlanes; ++plane) clear(plane);
  }

  void unit(int64_t index) {
    const Block block = this->block(index);
    double* partials = call_.partials + index * call_.predictions;
    if (call_.channels_last) {
      for (int64_t k = 0; k < call_.predictions; ++k) partials[k] = pixels(block, k);
      return;
    }
    clear(kSquaresB);
    const Rows<T> b = gather(call_.target, call_.target_dtype, block.sample, block, target_.get(), kSquaresB);
    for (int64_t k = 0; k < call_.predictions; ++k) {
      const int64_t sample = this->sample_of(block, k);
      clear(kSquaresA);
      for (int plane = kSum; plane <= kDotB; ++plane) clear(plane);
      const Rows<T> a = gather(call_.input, call_.input_dtype, sample, block, input_.get(), kSquaresA);
      const T* mask = this->mask_of(block, sample);
      set_units(mask, block.n);
      for_each_group(
          call_.channels,
          [&](auto rows, int64_t c) {
            constexpr int ROWS = decltype(rows)::value;
            const Rows<T> x{a.row(c), a.stride}, y{b.row(c), b.stride};
            const T* weights = this->weights_.get() + c;
            call_.saved ? add_differences<ROWS, true>(x, y, weights, block.n, planes_)
                        : add_differences<ROWS, false>(x, y, weights, block.n, planes_);
          },
          [&](bool last) { fold(kSum, call_.saved ? 3 : 1, block.n, last); });
      partials[k] = finish(mask, sample, block);
    }
  }

 private:
  // Rows at multiples of a page share few places of the caches, so that a block does not stay in them: such a block is
  // copied as it is read.
  bool copies() const {
    return call_.blocks() > 1 && call_.pixels * static_cast<int64_t>(sizeof(T)) % 1024 == 0;
  }
  // channels_last reads a pixel from memory and again from the first-level cache.
  int64_t scratch_of(Dtype dtype) const {
    if (call_.channels_last) return call_.channels + 16;
    return dtype == kNative<T> && !copies() ? 0 : call_.channels * stride_;
  }
  void clear(int plane) { std::memset(planes_.plane(plane), 0, static_cast<size_t>(stride_) * sizeof(T)); }

  void fold(int first, int count, int64_t n, bool last) {
    for (int j = 0; j < count; ++j) fold_plane(planes_.plane(first + j), planes_.plane(kTotals + j), n, last);
  }

  // The block's channels, whose squares are added up; in `scratch` unless they lie close together.
  Rows<T> gather(const void* data, Dtype dtype, int64_t sample, const Block& block, T* scratch, int plane) {
    T* squares = planes_.plane(plane);
    const int64_t offset = this->row_offset(sample, 0, block.begin);
    const bool native = dtype == kNative<T>;
    // To the rows that are read next but some: as many as a memory access takes, more of short ones.
    const int64_t ahead = native ? (least(1024 / block.n, 12) + 4) * call_.pixels : 0;
    const Rows<T> given{static_cast<const T*>(data) + (native ? offset : 0), call_.pixels};
    const Rows<T> copied{scratch, stride_};
    const Rows<T> found = native && !copies() ? given : copied;
    for_each_group(
        call_.channels,
        [&](auto rows, int64_t c) {
          constexpr int ROWS = decltype(rows)::value;
          T* to = scratch + c * stride_;
          if (native && copies())
            return add_squares<ROWS, true>(Rows<T>{given.row(c), given.stride}, block.n, to, stride_, squares,
                                           ahead);
          for (int j = 0; j < ROWS && !native; ++j)
            fetch(data, dtype, offset + (c + j) * call_.pixels, block.n, to + j * stride_);
          add_squares<ROWS, false>(Rows<T>{found.row(c), found.stride}, block.n, to, stride_, squares, ahead);
        },
        [&](bool last) { fold(plane, 1, block.n, last); });
    return found;
  }

  void set_units(const T* mask, int64_t n) {
    for_each_vector<V>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
      const V counted = mask ? load_part<V>(mask + i, count) : V(T(1));
      for (int side = 0; side < 2; ++side) {
        unit_factor(V::load(planes_.plane(kSquaresA + side) + i), V(eps_), counted)
            .store(planes_.plane(kUnitA + side) + i);
      }
    });
  }

  // The block's sum; saves what the backward needs.
  double finish(const T* mask, int64_t sample, const Block& block) {
    V sum(T(0));
    for_each_vector<V>(block.n, [&](int64_t i, int count) __attribute__((always_inline)) {
      const auto load = [&](int plane)
                            __attribute__((always_inline)) { return V::load(planes_.plane(plane) + i); };
      V value = first_of(load(kSum), count);
      if (mask) {
        const V counted = load_part<V>(mask + i, count);
        value = select_zero_(counted, counted * value);
      }
      sum = sum + value;
      if (call_.saved == nullptr) return;
      for (int side = 0; side < 2; ++side) {
        const V r = load(kUnitA + side);
        store_part(r, this->saved(side, sample, block.begin + i), count);
        store_part(along(V(kSlopes[side]), load(kDotA + side), r, load(kSquaresA + side)),
                   this->saved(2 + side, sample, block.begin + i), count);
      }
    });
    return sum.sum();
  }

  // channels_last: a pixel after the other.
  double pixels(const Block& block, int64_t k) {
    const int64_t channels = call_.channels, sample = this->sample_of(block, k);
    const T* weights = this->weights_.get();
    const T* mask = this->mask_of(block, sample);
    double total = 0;
    for (int64_t p = 0; p < block.n; ++p) {
      const int64_t pixel = block.begin + p;
      const T* a =
          fetch(call_.input, call_.input_dtype, this->pixel_offset(sample, pixel), channels, input_.get());
      const T* b = fetch(call_.target, call_.target_dtype, this->pixel_offset(block.sample, pixel), channels,
                         target_.get());
      T& squares_b = planes_.plane(kSquaresB)[p];
      if (k == 0) squares_b = square_sum(b, channels);
      const T squares[2] = {square_sum(a, channels), squares_b};
      const T counted = mask ? mask[p] : T(1);
      const T units[2] = {unit_factor(squares[0], eps_, counted), unit_factor(squares[1], eps_, counted)};
      const V r(units[0]), s(units[1]), minus_s(-units[1]);
      V sum(T(0)), dot_a(T(0)), dot_b(T(0));
      for_each_vector<V>(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
        const V x = load_part<V>(a + c, count), y = load_part<V>(b + c, count);
        const V d = difference(x, r, y, s, minus_s);
        const V weighted = load_part<V>(weights + c, count) * d;
        sum = fma_(weighted, d, sum);
        dot_a = fma_(weighted, x, dot_a);
        dot_b = fma_(weighted, y, dot_b);
      });
      total += static_cast<double>(select_zero_(counted, counted * sum.lane_sum()));
      if (call_.saved == nullptr) continue;
      const T dots[2] = {dot_a.lane_sum(), dot_b.lane_sum()};
      for (int side = 0; side < 2; ++side) {
        *this->saved(side, sample, pixel) = units[side];
        *this->saved(2 + side, sample, pixel) = along(kSlopes[side], dots[side], units[side], squares[side]);
      }
    }
    return total;
  }

  static constexpr T kSlopes[2] = {T(2), T(-2)};  // of w d^2 by a r and by b s, over w d

  Planes<T> planes_;
  T eps_;
  Scratch<T> input_, target_;
};

}  // namespace
}  // namespace ik::IK_ISA
