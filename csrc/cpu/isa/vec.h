// SIMD vector of floats for the instruction set this file is compiled for (csrc/cpu/isa/*.cpp are compiled
// once per set). Vec<float> has 16 lanes with AVX-512, else 8; without AVX it is an array that the compiler
// vectorises (SSE2, NEON). Vec<double> is always such an array: float64 is for checking, not for speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(IK_ISA_AVX512) || defined(IK_ISA_AVX2)
// GCC 12 takes the deliberately undefined operands inside these headers for mistakes (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#include "common/pixel.h"

#define IK_INLINE static inline __attribute__((always_inline))
#define IK_MEMBER inline __attribute__((always_inline))
#define IK_NOINLINE static __attribute__((noinline))

namespace ik::IK_ISA {

// The overloads for Vec below would hide those for single elements.
using ik::abs_;
using ik::max_;
using ik::min_;
using ik::select_positive_;
using ik::select_zero_;
using ik::sqrt_;
// value where weight == 0, else 0.
IK_INLINE float select_if_zero_(float weight, float value) { return weight == 0.0f ? value : 0.0f; }
IK_INLINE double select_if_zero_(double weight, double value) { return weight == 0.0 ? value : 0.0; }

template <typename T>
struct Vec {
  using Element = T;
  static constexpr int lanes = 8;
  T v[lanes];
  Vec() = default;
  IK_MEMBER explicit Vec(T x) {
    for (int i = 0; i < lanes; ++i) v[i] = x;
  }
  static IK_MEMBER Vec load(const T* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  IK_MEMBER void store(T* p) const { std::memcpy(p, v, sizeof(v)); }
  IK_MEMBER void stream(T* p) const { store(p); }
  IK_MEMBER double sum() const {
    double s = 0;
    for (int i = 0; i < lanes; ++i) s += v[i];
    return s;
  }
  IK_MEMBER T lane_sum() const {
    T s = v[0];
    for (int i = 1; i < lanes; ++i) s += v[i];
    return s;
  }
  // Bit i: lane i > 0 (or < 0).
  IK_MEMBER uint32_t positive_bits() const {
    uint32_t bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= uint32_t(v[i] > T(0)) << i;
    return bits;
  }
  IK_MEMBER uint32_t negative_bits() const {
    uint32_t bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= uint32_t(v[i] < T(0)) << i;
    return bits;
  }
  // +value where the bit of `positive` is set, -value for `negative`, else 0.
  static IK_MEMBER Vec signed_by(uint32_t positive, uint32_t negative, Vec value) {
    Vec r;
    for (int i = 0; i < lanes; ++i) {
      r.v[i] = (positive >> i) & 1 ? value.v[i] : ((negative >> i) & 1 ? -value.v[i] : T(0));
    }
    return r;
  }
};

#define IK_VEC_BINARY(name, expression)                          \
  template <typename T>                                          \
  IK_INLINE Vec<T> name(Vec<T> a, Vec<T> b) {                    \
    Vec<T> r;                                                    \
    for (int i = 0; i < Vec<T>::lanes; ++i) r.v[i] = expression; \
    return r;                                                    \
  }
IK_VEC_BINARY(operator+, a.v[i] + b.v[i])
IK_VEC_BINARY(operator-, a.v[i] - b.v[i])
IK_VEC_BINARY(operator*, a.v[i] * b.v[i])
IK_VEC_BINARY(operator/, a.v[i] / b.v[i])
IK_VEC_BINARY(min_, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
IK_VEC_BINARY(max_, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
IK_VEC_BINARY(select_zero_, a.v[i] == T(0) ? T(0) : b.v[i])
IK_VEC_BINARY(select_if_zero_, a.v[i] == T(0) ? b.v[i] : T(0))
#undef IK_VEC_BINARY
template <typename T>
IK_INLINE Vec<T> abs_(Vec<T> a) {
  for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] = std::fabs(a.v[i]);
  return a;
}
template <typename T>
IK_INLINE Vec<T> select_positive_(Vec<T> x, Vec<T> value, Vec<T> other) {
  for (int i = 0; i < Vec<T>::lanes; ++i) value.v[i] = x.v[i] > T(0) ? value.v[i] : other.v[i];
  return value;
}
template <typename T>
IK_INLINE bool all_equal_(Vec<T> a, Vec<T> b) {
  int equal = 0;
  for (int i = 0; i < Vec<T>::lanes; ++i) equal += a.v[i] == b.v[i];
  return equal == Vec<T>::lanes;
}
template <typename T>
IK_INLINE Vec<T> fma_(Vec<T> a, Vec<T> b, Vec<T> c) {
  for (int i = 0; i < Vec<T>::lanes; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
template <typename T>
IK_INLINE Vec<T> sqrt_(Vec<T> a) {
  for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
}

#if defined(IK_ISA_AVX512)

template <>
struct Vec<float> {
  using Element = float;
  static constexpr int lanes = 16;
  __m512 v;
  Vec() = default;
  IK_MEMBER Vec(__m512 x) : v(x) {}
  IK_MEMBER explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
  static IK_MEMBER Vec load(const float* p) { return _mm512_loadu_ps(p); }
  IK_MEMBER void store(float* p) const { _mm512_storeu_ps(p, v); }
  IK_MEMBER void stream(float* p) const { _mm512_stream_ps(p, v); }
  IK_MEMBER double sum() const {
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)),
                                              _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
  }
  IK_MEMBER float lane_sum() const { return _mm512_reduce_add_ps(v); }
  IK_MEMBER uint32_t positive_bits() const { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ); }
  IK_MEMBER uint32_t negative_bits() const { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ); }
  static IK_MEMBER Vec signed_by(uint32_t positive, uint32_t negative, Vec value) {
    const __m512 plus = _mm512_maskz_mov_ps(static_cast<__mmask16>(positive), value.v);
    return _mm512_mask_sub_ps(plus, static_cast<__mmask16>(negative), _mm512_setzero_ps(), value.v);
  }
};
IK_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return _mm512_add_ps(a.v, b.v); }
IK_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return _mm512_sub_ps(a.v, b.v); }
IK_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return _mm512_mul_ps(a.v, b.v); }
IK_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm512_div_ps(a.v, b.v); }
IK_INLINE Vec<float> fma_(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
IK_INLINE Vec<float> min_(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a.v, b.v); }
IK_INLINE Vec<float> max_(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a.v, b.v); }
IK_INLINE Vec<float> abs_(Vec<float> a) { return _mm512_abs_ps(a.v); }
IK_INLINE Vec<float> sqrt_(Vec<float> a) { return _mm512_sqrt_ps(a.v); }
IK_INLINE Vec<float> select_zero_(Vec<float> weight, Vec<float> value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(weight.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), value.v);
}
IK_INLINE Vec<float> select_if_zero_(Vec<float> weight, Vec<float> value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(weight.v, _mm512_setzero_ps(), _CMP_EQ_OQ), value.v);
}

IK_INLINE bool all_equal_(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ) == 0xffff;
}
IK_INLINE Vec<float> select_positive_(Vec<float> x, Vec<float> value, Vec<float> other) {
  return _mm512_mask_mov_ps(other.v, _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), value.v);
}

#elif defined(IK_ISA_AVX2)

template <>
struct Vec<float> {
  using Element = float;
  static constexpr int lanes = 8;
  __m256 v;
  Vec() = default;
  IK_MEMBER Vec(__m256 x) : v(x) {}
  IK_MEMBER explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
  static IK_MEMBER Vec load(const float* p) { return _mm256_loadu_ps(p); }
  IK_MEMBER void store(float* p) const { _mm256_storeu_ps(p, v); }
  IK_MEMBER void stream(float* p) const { _mm256_stream_ps(p, v); }
  IK_MEMBER double sum() const {
    const __m256d s = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                                    _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    const __m128d h = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
    return _mm_cvtsd_f64(_mm_add_sd(h, _mm_unpackhi_pd(h, h)));
  }
  IK_MEMBER float lane_sum() const {
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 h = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }
  IK_MEMBER uint32_t positive_bits() const {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ)));
  }
  IK_MEMBER uint32_t negative_bits() const {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ)));
  }
  static IK_MEMBER __m256 mask_of(uint32_t bits) {
    const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i spread = _mm256_set1_epi32(static_cast<int>(bits));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(spread, place), place));
  }
  static IK_MEMBER Vec signed_by(uint32_t positive, uint32_t negative, Vec value) {
    const __m256 minus = _mm256_xor_ps(value.v, _mm256_set1_ps(-0.0f));
    return _mm256_or_ps(_mm256_and_ps(mask_of(positive), value.v), _mm256_and_ps(mask_of(negative), minus));
  }
};
IK_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return _mm256_add_ps(a.v, b.v); }
IK_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return _mm256_sub_ps(a.v, b.v); }
IK_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return _mm256_mul_ps(a.v, b.v); }
IK_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return _mm256_div_ps(a.v, b.v); }
IK_INLINE Vec<float> fma_(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
IK_INLINE Vec<float> min_(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a.v, b.v); }
IK_INLINE Vec<float> max_(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a.v, b.v); }
IK_INLINE Vec<float> abs_(Vec<float> a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
IK_INLINE Vec<float> sqrt_(Vec<float> a) { return _mm256_sqrt_ps(a.v); }
IK_INLINE Vec<float> select_zero_(Vec<float> weight, Vec<float> value) {
  return _mm256_and_ps(_mm256_cmp_ps(weight.v, _mm256_setzero_ps(), _CMP_NEQ_UQ), value.v);
}
IK_INLINE Vec<float> select_if_zero_(Vec<float> weight, Vec<float> value) {
  return _mm256_and_ps(_mm256_cmp_ps(weight.v, _mm256_setzero_ps(), _CMP_EQ_OQ), value.v);
}
IK_INLINE bool all_equal_(Vec<float> a, Vec<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)) == 0xff;
}
IK_INLINE Vec<float> select_positive_(Vec<float> x, Vec<float> value, Vec<float> other) {
  return _mm256_blendv_ps(other.v, value.v, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_GT_OQ));
}

#endif

}  // namespace ik::IK_ISA
