// Weighted sums over the rows and columns of symmetric windows, for every radius compiled apart: the weights and the
// sums of eight rows stay in registers.
#pragma once

#include "cpu/isa/convert.h"
#include "cpu/isa/scratch.h"
#include "cpu/ssim.h"

namespace ik::IK_ISA {
namespace {

// Rows that are summed at a time.
constexpr int kRows = 8;

template <int R, typename T>
struct Weights {
  Vec<T> at[R + 1];
  explicit Weights(const T* weights) {
    for (int k = 0; k <= R; ++k) at[k] = Vec<T>(weights[k]);
  }
};

// The sums over x - R .. x + R of s, d, s^2 and d^2, for whole vectors from 0 on until `n` are done.
template <int R, typename T>
void sum_moments(const T* s, const T* d, const T* weights, int64_t n, T* const* out) {
  using V = Vec<T>;
  const Weights<R, T> w(weights);
  for (int64_t x = 0; x < n; x += V::lanes) {
    const V a = V::load(s + x), b = V::load(d + x);
    V sum_a = w.at[0] * a, sum_b = w.at[0] * b;
    V sum_aa = sum_a * a, sum_bb = sum_b * b;
#pragma GCC unroll 8
    for (int k = 1; k <= R; ++k) {
      const V a1 = V::load(s + x - k), a2 = V::load(s + x + k);
      const V b1 = V::load(d + x - k), b2 = V::load(d + x + k);
      sum_a = fma_(w.at[k], a1 + a2, sum_a);
      sum_b = fma_(w.at[k], b1 + b2, sum_b);
      sum_aa = fma_(w.at[k], fma_(a1, a1, a2 * a2), sum_aa);
      sum_bb = fma_(w.at[k], fma_(b1, b1, b2 * b2), sum_bb);
    }
    sum_a.store(out[0] + x);
    sum_b.store(out[1] + x);
    sum_aa.store(out[2] + x);
    sum_bb.store(out[3] + x);
  }
}

// The sums over x - R .. x + R of a row.
template <int R, typename T>
void sum_across(const T* in, const T* weights, int64_t n, T* out) {
  using V = Vec<T>;
  const Weights<R, T> w(weights);
  for (int64_t x = 0; x < n; x += V::lanes) {
    V sum = w.at[0] * V::load(in + x);
#pragma GCC unroll 8
    for (int k = 1; k <= R; ++k) sum = fma_(w.at[k], V::load(in + x - k) + V::load(in + x + k), sum);
    sum.store(out + x);
  }
}

// Row i of `out`, kRows of them, becomes the sum over rows i .. i + 2 R of `rows`.
template <int R, typename T>
void sum_down(const T* const* rows, const T* weights, int64_t n, T* out, int64_t stride) {
  using V = Vec<T>;
  const Weights<R, T> w(weights);
  for (int64_t x = 0; x < n; x += V::lanes) {
    V sums[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sums[i] = V(T(0));
#pragma GCC unroll 32
    for (int j = 0; j < kRows + 2 * R; ++j) {
      const V row = V::load(rows[j] + x);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const int k = j - i - R;
        if (k >= -R && k <= R) sums[i] = fma_(w.at[k < 0 ? -k : k], row, sums[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sums[i].store(out + i * stride + x);
  }
}

template <typename T>
struct Blur {
  void (*moments)(const T* s, const T* d, const T* weights, int64_t n, T* const* out);
  void (*across)(const T* in, const T* weights, int64_t n, T* out);
  void (*down)(const T* const* rows, const T* weights, int64_t n, T* out, int64_t stride);
};

template <typename T>
Blur<T> blur_of(int radius) {
  constexpr Blur<T> kBlurs[kMaxRadius] = {
      {sum_moments<1, T>, sum_across<1, T>, sum_down<1, T>},
      {sum_moments<2, T>, sum_across<2, T>, sum_down<2, T>},
      {sum_moments<3, T>, sum_across<3, T>, sum_down<3, T>},
      {sum_moments<4, T>, sum_across<4, T>, sum_down<4, T>},
      {sum_moments<5, T>, sum_across<5, T>, sum_down<5, T>},
      {sum_moments<6, T>, sum_across<6, T>, sum_down<6, T>},
      {sum_moments<7, T>, sum_across<7, T>, sum_down<7, T>},
  };
  return kBlurs[radius - 1];
}

}  // namespace
}  // namespace ik::IK_ISA
