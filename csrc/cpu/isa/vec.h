// SIMD vector of floats for the instruction set this file is compiled for (csrc/cpu/isa/*.cpp are compiled
// once per set). Vec<float> has 16 lanes with AVX-512, else 8; without AVX it is an array that the compiler
// vectorises (SSE2, NEON). Vec<double> is always such an array: float64 is for checking, not for speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(IK_ISA_AVX512) || defined(IK_ISA_AVX2)
#define IK_ISA_AVX 1
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
// b where a == 0, else 0.
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

#if defined(IK_ISA_AVX)

// IK_MM(add_ps): what both sets name alike. Lanes: a truth value for every lane. Halves: 16 bits for every lane.
#if defined(IK_ISA_AVX512)
#define IK_MM(name) _mm512_##name
using Register = __m512;
using Integers = __m512i;
using Halves = __m256i;
using Lanes = __mmask16;
template <int COMPARISON>
IK_INLINE Lanes compare(Register a, Register b) {
  return _mm512_cmp_ps_mask(a, b, COMPARISON);
}
IK_INLINE uint32_t bits_of(Lanes lanes) { return lanes; }
IK_INLINE Register keep(Lanes lanes, Register x) { return _mm512_maskz_mov_ps(lanes, x); }
IK_INLINE Register choose(Lanes lanes, Register x, Register other) {
  return _mm512_mask_mov_ps(other, lanes, x);
}
IK_INLINE Register absolute(Register x) { return _mm512_abs_ps(x); }
IK_INLINE Register signed_lanes(uint32_t positive, uint32_t negative, Register x) {
  const Register plus = keep(static_cast<Lanes>(positive), x);
  return _mm512_mask_sub_ps(plus, static_cast<Lanes>(negative), _mm512_setzero_ps(), x);
}
IK_INLINE float lane_sum(Register x) { return _mm512_reduce_add_ps(x); }
IK_INLINE double double_sum(Register x) {
  return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
                                            _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))));
}
IK_INLINE Register load_first(const float* p, int valid) {
  return _mm512_maskz_loadu_ps(static_cast<Lanes>((1u << valid) - 1), p);
}
IK_INLINE void store_first(Register x, float* p, int valid) {
  _mm512_mask_storeu_ps(p, static_cast<Lanes>((1u << valid) - 1), x);
}
IK_INLINE Halves load_halves(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
IK_INLINE void store_halves(Halves x, void* p, bool stream) {
  __m256i* at = static_cast<__m256i*>(p);
  stream ? _mm256_stream_si256(at, x) : _mm256_storeu_si256(at, x);
}
IK_INLINE Halves low_halves(Integers x) { return _mm512_cvtepi32_epi16(x); }
#else
#define IK_MM(name) _mm256_##name
using Register = __m256;
using Integers = __m256i;
using Halves = __m128i;
using Lanes = __m256;
template <int COMPARISON>
IK_INLINE Lanes compare(Register a, Register b) {
  return _mm256_cmp_ps(a, b, COMPARISON);
}
IK_INLINE uint32_t bits_of(Lanes lanes) { return static_cast<uint32_t>(_mm256_movemask_ps(lanes)); }
IK_INLINE Lanes lanes_of(uint32_t bits) {
  const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i spread = _mm256_set1_epi32(static_cast<int>(bits));
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(spread, place), place));
}
IK_INLINE Register keep(Lanes lanes, Register x) { return _mm256_and_ps(lanes, x); }
IK_INLINE Register choose(Lanes lanes, Register x, Register other) {
  return _mm256_blendv_ps(other, x, lanes);
}
IK_INLINE Register absolute(Register x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
IK_INLINE Register signed_lanes(uint32_t positive, uint32_t negative, Register x) {
  const Register minus = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
  return _mm256_or_ps(keep(lanes_of(positive), x), keep(lanes_of(negative), minus));
}
IK_INLINE float lane_sum(Register x) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 h = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
IK_INLINE double double_sum(Register x) {
  const __m256d s =
      _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
  const __m128d h = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
  return _mm_cvtsd_f64(_mm_add_sd(h, _mm_unpackhi_pd(h, h)));
}
IK_INLINE __m256i first_lanes(int valid) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(valid), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
IK_INLINE Register load_first(const float* p, int valid) { return _mm256_maskload_ps(p, first_lanes(valid)); }
IK_INLINE void store_first(Register x, float* p, int valid) { _mm256_maskstore_ps(p, first_lanes(valid), x); }
IK_INLINE Halves load_halves(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
IK_INLINE void store_halves(Halves x, void* p, bool stream) {
  __m128i* at = static_cast<__m128i*>(p);
  stream ? _mm_stream_si128(at, x) : _mm_storeu_si128(at, x);
}
IK_INLINE Halves low_halves(Integers x) {
  // packus works within 128-bit halves: the permutation brings the two wanted quarters together.
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08));
}
#endif

template <>
struct Vec<float> {
  using Element = float;
  static constexpr int lanes = sizeof(Register) / sizeof(float);
  Register v;
  Vec() = default;
  IK_MEMBER Vec(Register x) : v(x) {}
  IK_MEMBER explicit Vec(float x) : v(IK_MM(set1_ps)(x)) {}
  static IK_MEMBER Vec load(const float* p) { return IK_MM(loadu_ps)(p); }
  IK_MEMBER void store(float* p) const { IK_MM(storeu_ps)(p, v); }
  IK_MEMBER void stream(float* p) const { IK_MM(stream_ps)(p, v); }
  IK_MEMBER double sum() const { return double_sum(v); }
  IK_MEMBER float lane_sum() const { return IK_ISA::lane_sum(v); }
  IK_MEMBER uint32_t positive_bits() const { return bits_of(compare<_CMP_GT_OQ>(v, IK_MM(setzero_ps)())); }
  IK_MEMBER uint32_t negative_bits() const { return bits_of(compare<_CMP_LT_OQ>(v, IK_MM(setzero_ps)())); }
  static IK_MEMBER Vec signed_by(uint32_t positive, uint32_t negative, Vec value) {
    return signed_lanes(positive, negative, value.v);
  }
};
IK_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return a.v + b.v; }
IK_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return a.v - b.v; }
IK_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return a.v * b.v; }
IK_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return a.v / b.v; }
IK_INLINE Vec<float> fma_(Vec<float> a, Vec<float> b, Vec<float> c) { return IK_MM(fmadd_ps)(a.v, b.v, c.v); }
IK_INLINE Vec<float> min_(Vec<float> a, Vec<float> b) { return IK_MM(min_ps)(a.v, b.v); }
IK_INLINE Vec<float> max_(Vec<float> a, Vec<float> b) { return IK_MM(max_ps)(a.v, b.v); }
IK_INLINE Vec<float> abs_(Vec<float> a) { return absolute(a.v); }
IK_INLINE Vec<float> sqrt_(Vec<float> a) { return IK_MM(sqrt_ps)(a.v); }
IK_INLINE Vec<float> select_zero_(Vec<float> weight, Vec<float> value) {
  return keep(compare<_CMP_NEQ_UQ>(weight.v, IK_MM(setzero_ps)()), value.v);
}
IK_INLINE Vec<float> select_if_zero_(Vec<float> weight, Vec<float> value) {
  return keep(compare<_CMP_EQ_OQ>(weight.v, IK_MM(setzero_ps)()), value.v);
}
IK_INLINE Vec<float> select_positive_(Vec<float> x, Vec<float> value, Vec<float> other) {
  return choose(compare<_CMP_GT_OQ>(x.v, IK_MM(setzero_ps)()), value.v, other.v);
}
IK_INLINE bool all_equal_(Vec<float> a, Vec<float> b) {
  return bits_of(compare<_CMP_EQ_OQ>(a.v, b.v)) == (1u << Vec<float>::lanes) - 1;
}

#endif

// The first `count` lanes of x, 0 in the others.
template <typename T>
IK_INLINE Vec<T> first_of(Vec<T> x, int count) {
  return count == Vec<T>::lanes ? x : Vec<T>::signed_by((1u << count) - 1, 0, x);
}

// The first `count` of LANES bits as bytes.
template <int LANES>
IK_INLINE void store_bits(uint32_t bits, uint8_t* to, int count) {
  if (count == LANES) {
    std::memcpy(to, &bits, LANES / 8);
  } else {
    for (int g = 0; 8 * g < count; ++g) to[g] = static_cast<uint8_t>(bits >> (8 * g));
  }
}

}  // namespace ik::IK_ISA
