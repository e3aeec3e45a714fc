// Partial convolution along contiguous runs, for tensors of one dtype that all lie the same way: a run is the
// pixels of one channel, or the channels of one pixel where everything is interleaved.
#pragma once

#include "cpu/isa/convert.h"
#include "cpu/partial_conv.h"
#include "cpu/isa/scratch.h"

namespace ik::IK_ISA {
namespace {

// A value for every element of a run, or one for all of it.
template <bool EACH, typename T>
IK_INLINE Vec<T> run_vec(const T* p, int64_t i) {
  return EACH ? Vec<T>::load(p + i) : Vec<T>(*p);
}
template <bool EACH, typename T>
IK_INLINE T run_one(const T* p, int64_t i) {
  return EACH ? p[i] : *p;
}

template <bool EACH, typename S, typename M, typename T>
IK_INLINE void mask_run(const S* x, const M* mask, S* out, int64_t n) {
  constexpr int L = Vec<T>::lanes;
  const bool in_place = x == out;
  const Vec<T> zero(T(0)), one(T(1));
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    if constexpr (EACH) prefetch(mask + i);
    const Vec<T> m = EACH ? load_vec(mask + i) : Vec<T>(load_one(mask));
    // Masks are nearly all zeros and ones: a hole need not be read, and what is known stays in place as it
    // is.
    if (in_place && all_equal_(m, one)) continue;
    if (all_equal_(m, zero)) {
      store_vec(zero, out + i, false);
      continue;
    }
    prefetch(x + i);
    store_vec(select_zero_(m, load_vec(x + i) * m), out + i, false);
  }
  for (; i < n; ++i) {
    const T m = load_one(mask + (EACH ? i : 0));
    store_one(select_zero_(m, load_one(x + i) * m), out + i);
  }
}

// Planes: each element's for a run of pixels, one for a run of channels; the bias the other way round.
template <bool INTERLEAVED, typename S, typename T>
IK_INLINE void finish_run(const S* raw, const T* ratio, const T* new_mask, const T* bias, S* out, int64_t n,
                          T slope, const Finish& how) {
  constexpr int L = Vec<T>::lanes;
  constexpr bool PLANE = !INTERLEAVED;
  const Vec<T> slopes(slope);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    prefetch(raw + i);
    const Vec<T> x = finish(load_vec(raw + i), run_vec<PLANE>(ratio, i), run_vec<PLANE>(new_mask, i),
                            run_vec<INTERLEAVED>(bias, i), slopes, how);
    store_vec(x, out + i, false);
  }
  for (; i < n; ++i) {
    const T x = finish<T>(load_one(raw + i), run_one<PLANE>(ratio, i), run_one<PLANE>(new_mask, i),
                          run_one<INTERLEAVED>(bias, i), slope, how);
    store_one(x, out + i);
  }
}

// `sums`: [n] for a run of channels, one for a run of pixels.
template <bool INTERLEAVED, typename S, typename T>
IK_INLINE void finish_backward_run(const S* grad, const S* output, const T* ratio, const T* new_mask, S* out,
                                   T* sums, int64_t n, T slope, const Finish& how) {
  constexpr int L = Vec<T>::lanes;
  constexpr bool PLANE = !INTERLEAVED;
  const Vec<T> slopes(slope);
  Vec<T> total(T(0));
  T rest(0);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    prefetch(grad + i);
    const Vec<T> r = run_vec<PLANE>(ratio, i);
    const Vec<T> y = output == nullptr ? Vec<T>(T(0)) : load_vec(output + i);
    const Vec<T> g = finish_bias_grad(load_vec(grad + i), y, r, run_vec<PLANE>(new_mask, i), slopes, how);
    if (INTERLEAVED) {
      (Vec<T>::load(sums + i) + g).store(sums + i);
    } else {
      total = total + g;
    }
    store_vec(finish_raw_grad(g, r, how), out + i, false);
  }
  for (; i < n; ++i) {
    const T r = run_one<PLANE>(ratio, i);
    const T y = output == nullptr ? T(0) : load_one(output + i);
    const T g = finish_bias_grad<T>(load_one(grad + i), y, r, run_one<PLANE>(new_mask, i), slope, how);
    if (INTERLEAVED) {
      sums[i] += g;
    } else {
      rest += g;
    }
    store_one(finish_raw_grad<T>(g, r, how), out + i);
  }
  if (!INTERLEAVED) *sums += total.lane_sum() + rest;
}

// Calls f(unit, sample, channel, pixel, elements) for every run of the units.
template <typename F>
IK_INLINE void for_runs(const PartialConvCall& call, bool interleaved, int64_t begin, int64_t end,
                        const F& f) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / call.tiles(), first = unit % call.tiles() * PartialConvCall::tile;
    const int64_t last = least(first + PartialConvCall::tile, call.pixels);
    if (interleaved) {
      for (int64_t s = first; s < last; ++s) f(unit, n, int64_t(0), s, call.channels);
    } else {
      for (int64_t c = 0; c < call.channels; ++c) f(unit, n, c, first, last - first);
    }
  }
}

template <typename S>
IK_INLINE S* at(const ImageView& view, int64_t n, int64_t c, int64_t s) {
  return static_cast<S*>(view.data) + n * view.stride_n + c * view.stride_c + s * view.stride_s;
}

template <typename T>
IK_INLINE const T* at(const PlaneView& view, const PartialConvCall& call, int64_t n, int64_t c, int64_t s) {
  const int64_t plane = view.planes == 1 ? 0 : c / (call.channels / view.planes);
  return static_cast<const T*>(view.data) + n * view.stride_n + plane * call.pixels + s;
}

template <bool INTERLEAVED, typename S, typename M, typename T>
void mask_input_runs(const PartialConvCall& call, int64_t begin, int64_t end) {
  for_runs(call, INTERLEAVED, begin, end, [&](int64_t, int64_t n, int64_t c, int64_t s, int64_t count) {
    const S* x = at<S>(call.source, n, c, s);
    S* out = at<S>(call.result, n, c, s);
    if (call.mask.data != nullptr) return mask_run<true, S, M, T>(x, at<M>(call.mask, n, c, s), out, count);
    const T* plane = at<T>(call.single_mask, call, n, c, s);
    mask_run<!INTERLEAVED, S, T, T>(x, plane, out, count);
  });
}

template <bool INTERLEAVED, typename S, typename T>
void finish_runs(const PartialConvCall& call, int64_t begin, int64_t end) {
  const Finish how = call.how;
  const T slope = static_cast<T>(call.slope);
  const T* bias = static_cast<const T*>(call.bias);
  for_runs(call, INTERLEAVED, begin, end, [&](int64_t, int64_t n, int64_t c, int64_t s, int64_t count) {
    finish_run<INTERLEAVED, S, T>(at<S>(call.source, n, c, s), at<T>(call.ratio, call, n, c, s),
                                  at<T>(call.new_mask, call, n, c, s), bias + c, at<S>(call.result, n, c, s),
                                  count, slope, how);
  });
}

template <bool INTERLEAVED, typename S, typename T>
void finish_backward_runs(const PartialConvCall& call, int64_t begin, int64_t end) {
  const Finish how = call.how;
  const T slope = static_cast<T>(call.slope);
  T* sums = static_cast<T*>(call.bias_sums);
  for_runs(call, INTERLEAVED, begin, end, [&](int64_t unit, int64_t n, int64_t c, int64_t s, int64_t count) {
    const S* output = call.output.data == nullptr ? nullptr : at<S>(call.output, n, c, s);
    finish_backward_run<INTERLEAVED, S, T>(at<S>(call.source, n, c, s), output,
                                           at<T>(call.ratio, call, n, c, s),
                                           at<T>(call.new_mask, call, n, c, s), at<S>(call.result, n, c, s),
                                           sums + unit * call.channels + c, count, slope, how);
  });
}

}  // namespace
}  // namespace ik::IK_ISA
