// Backward of channel columns: one elementwise sweep with four coefficients a pixel.
#pragma once

#include "cpu/isa/columns_worker.h"

namespace ik::IK_ISA {
namespace {

enum BackwardPlane { kR, kS, kSlopeA, kAlongA, kSlopeB, kAlongB, kMask, kBackwardPlanes };

// Gradients of n elements that follow one another in memory; `get(i, count)` tells about elements i, i + 1, ...
template <typename V>
struct Slopes {
  V weight, r, s, slope_a, along_a, slope_b, along_b, mask;
};
template <typename S>
struct GradientRun {
  const S* a;
  const S* b;
  int64_t n;
  int64_t ahead;  // to what is read next
  S* grad_a;      // null where not wanted
  S* grad_b;
  bool add_b;  // to what another prediction left there
  bool stream;
};

template <bool A, bool B, bool MASKED, typename V, typename S, typename Get>
IK_INLINE void differentiate_as(const GradientRun<S>& run, const Get& get) {
  using T = typename V::Element;
  const auto at = [&](int64_t i, int count, bool stream) __attribute__((always_inline)) {
    const Slopes<V> of = get(i, count);
    const V x = load_part<V>(run.a + i, count), y = load_part<V>(run.b + i, count);
    __builtin_prefetch(run.a + i + run.ahead);
    __builtin_prefetch(run.b + i + run.ahead);
    const V weighted = of.weight * difference(x, of.r, y, of.s, V(T(0)) - of.s);
    const auto counted = [&](V value) __attribute__((always_inline)) {
      return MASKED ? select_zero_(of.mask, value) : value;
    };
    if constexpr (A)
      store_part(counted(fma_(of.slope_a, weighted, of.along_a * x)), run.grad_a + i, count, stream);
    if constexpr (B) {
      const V value = counted(fma_(of.slope_b, weighted, of.along_b * y));
      store_part(run.add_b ? load_part<V>(run.grad_b + i, count) + value : value, run.grad_b + i, count,
                 stream && !A);
    }
  };
  // Rows of odd planes start anywhere: stores around the cache begin at the next whole vector.
  int64_t i = 0;
  if (run.stream) {
    const auto address = reinterpret_cast<uintptr_t>(A ? run.grad_a : run.grad_b);
    i = least(static_cast<int64_t>((0 - address) / sizeof(S) % V::lanes), run.n);
    if (i > 0) at(0, static_cast<int>(i), false);
  }
  for (; i + V::lanes <= run.n; i += V::lanes) at(i, V::lanes, run.stream);
  if (i < run.n) at(i, static_cast<int>(run.n - i), false);
}

template <typename T>
class Backward : Worker<T> {
  using Base = Worker<T>;
  using V = Vec<T>;
  using Base::call_;
  using Base::stride_;
  using typename Base::Block;

 public:
  explicit Backward(const ColumnsCall& call)
      : Base(call, kBackwardPlanes * static_cast<int>(call.predictions)),
        length_(call.channels_last ? call.channels + 16 : stride_),
        buffers_(4 * length_) {}

  void unit(int64_t index) {
    const Block block = this->block(index);
    for (int64_t k = 0; k < call_.predictions; ++k) prepare(block, k);
    // Half types are converted as they are loaded and stored, but for sums over predictions.
    const bool one_type =
        call_.input_dtype == call_.target_dtype && (call_.predictions == 1 || call_.grad_target == nullptr);
    with_stored(one_type ? call_.input_dtype : kNative<T>, [&](auto stored) {
      using S = typename decltype(stored)::type;
      unit_as<std::conditional_t<sizeof(T) == 4 && sizeof(S) == 2, S, T>>(block);
    });
  }

 private:
  template <typename S>
  void unit_as(const Block& block) {
    const bool last = call_.channels_last;
    const int64_t runs = last ? block.n : call_.channels;
    for (int64_t j = 0; j < runs; ++j) {
      for (int64_t k = 0; k < call_.predictions; ++k) {
        const int64_t sample = this->sample_of(block, k);
        GradientRun<S> run;
        run.n = last ? call_.channels : block.n;
        run.ahead = last ? call_.channels : call_.pixels;
        const int64_t offset = offset_of(sample, j, block), target_offset = offset_of(block.sample, j, block);
        run.a = fetch(call_.input, call_.input_dtype, offset, run.n, buffer<S>(0));
        run.b = fetch(call_.target, call_.target_dtype, target_offset, run.n, buffer<S>(1));
        run.grad_a = output_at(call_.grad_input, call_.input_dtype, offset, buffer<S>(2));
        run.grad_b = output_at(call_.grad_target, call_.target_dtype, target_offset, buffer<S>(3));
        run.add_b = k > 0;
        // What is added to is read again.
        run.stream =
            call_.stream && (run.grad_a != nullptr ? run.grad_a != buffer<S>(2)
                                                   : run.grad_b != buffer<S>(3) && call_.predictions == 1);
        last ? of_pixel(run, k, j) : of_channel(run, k, j);
        store_output(call_.grad_input, call_.input_dtype, offset, run.n, run.grad_a);
        if (k + 1 == call_.predictions)
          store_output(call_.grad_target, call_.target_dtype, target_offset, run.n, run.grad_b);
      }
    }
  }

  int64_t offset_of(int64_t sample, int64_t j, const Block& block) const {
    return call_.channels_last ? this->pixel_offset(sample, block.begin + j)
                               : this->row_offset(sample, j, block.begin);
  }
  template <typename S>
  S* buffer(int i) {
    return reinterpret_cast<S*>(buffers_.get() + i * length_);
  }
  Planes<T> planes(int64_t k) { return {this->planes_data_.get() + k * kBackwardPlanes * stride_, stride_}; }

  // The coefficients of a block times what every pixel of the sample counts.
  void prepare(const Block& block, int64_t k) {
    const int64_t sample = this->sample_of(block, k);
    const T* mask = this->mask_of(block, sample);
    const Planes<T> planes = this->planes(k);
    const V factor(static_cast<T>(call_.factors[sample]));
    for_each_vector<V>(block.n, [&](int64_t i, int count) __attribute__((always_inline)) {
      const auto load = [&](int index) __attribute__((always_inline)) {
        return load_part<V>(this->saved(index, sample, block.begin + i), count);
      };
      const auto store = [&](V value, int plane)
                             __attribute__((always_inline)) { value.store(planes.plane(plane) + i); };
      const V counted = mask ? load_part<V>(mask + i, count) : V(T(1));
      const V share = factor * counted, r = load(0), s = load(1);
      store(counted, kMask);
      store(r, kR);
      store(s, kS);
      store(V(T(2)) * share * r, kSlopeA);
      store(V(T(0)) - share * load(2), kAlongA);
      store(V(T(-2)) * share * s, kSlopeB);
      store(V(T(0)) - share * load(3), kAlongB);
    });
  }

  template <typename S>
  void of_channel(const GradientRun<S>& run, int64_t k, int64_t c) {
    const Planes<T> planes = this->planes(k);
    const V weight(this->weights_.get()[c]);
    differentiate(run, [&](int64_t i, int) __attribute__((always_inline)) {
      const auto load = [&](int plane)
                            __attribute__((always_inline)) { return V::load(planes.plane(plane) + i); };
      return Slopes<V>{weight,        load(kR),      load(kS),      load(kSlopeA),
                       load(kAlongA), load(kSlopeB), load(kAlongB), load(kMask)};
    });
  }

  template <typename S>
  void of_pixel(const GradientRun<S>& run, int64_t k, int64_t p) {
    const Planes<T> planes = this->planes(k);
    const auto value = [&](int plane) { return V(planes.plane(plane)[p]); };
    Slopes<V> of{V(T(0)),        value(kR),      value(kS),      value(kSlopeA),
                 value(kAlongA), value(kSlopeB), value(kAlongB), value(kMask)};
    differentiate(run, [&](int64_t c, int count) __attribute__((always_inline)) {
      of.weight = load_part<V>(this->weights_.get() + c, count);
      return of;
    });
  }

  template <typename S, typename Get>
  IK_MEMBER void differentiate(const GradientRun<S>& run, const Get& get) const {
    with_bool(call_.mask != nullptr, [&](auto masked) __attribute__((always_inline)) {
      constexpr bool MASKED = decltype(masked)::value;
      if (run.grad_a != nullptr && run.grad_b != nullptr)
        return differentiate_as<true, true, MASKED, V>(run, get);
      if (run.grad_a != nullptr) return differentiate_as<true, false, MASKED, V>(run, get);
      differentiate_as<false, true, MASKED, V>(run, get);
    });
  }

  int64_t length_;
  Scratch<T> buffers_;
};

}  // namespace
}  // namespace ik::IK_ISA
