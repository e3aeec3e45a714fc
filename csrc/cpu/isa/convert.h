// Conversion between storage types and the accumulation type, a run of elements at a time.
#pragma once

#include <type_traits>

#include "cpu/isa/vec.h"
#include "cpu/kernels.h"

namespace ik::IK_ISA {

// How T itself is stored.
template <typename T>
constexpr Dtype kNative = sizeof(T) == 4 ? Dtype::f32 : Dtype::f64;

IK_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
IK_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

IK_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Scaling by 2^112 moves the exponent and normalises subnormals in one multiplication.
  const float value = bits_to_float(magnitude << 13) * 5.192296858534828e33f;
  return bits_to_float(sign | float_to_bits(value));
}

IK_INLINE uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to Inf
  if (magnitude < 0x38800000u) {
    // Subnormal half: adding 0.5 aligns the mantissa so that the float adder rounds to nearest even.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

IK_INLINE uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t rounded = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  return x != x ? static_cast<uint16_t>(0x7fc0u) : rounded;
}

// Half types as stored.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// One element, or a vector of them, as the type the kernels compute in.
template <typename T>
IK_INLINE T load_one(const T* p) {
  return *p;
}
IK_INLINE float load_one(const Half* p) { return half_to_float(p->bits); }
IK_INLINE float load_one(const Bfloat16* p) { return bits_to_float(static_cast<uint32_t>(p->bits) << 16); }
IK_INLINE void store_one(float x, Half* p) { p->bits = float_to_half(x); }
IK_INLINE void store_one(float x, Bfloat16* p) { p->bits = float_to_bfloat16(x); }
template <typename T>
IK_INLINE void store_one(T x, T* p) {
  *p = x;
}

// Any T as any stored type.
template <typename T, typename S>
IK_INLINE void store_as(T x, S* p) {
  if constexpr (sizeof(S) == 2) {
    store_one(static_cast<float>(x), p);
  } else {
    *p = static_cast<S>(x);
  }
}

template <typename T>
IK_INLINE Vec<T> load_vec(const T* p) {
  return Vec<T>::load(p);
}
// `stream` writes around the cache and needs an aligned address.
template <typename T>
IK_INLINE void store_vec(Vec<T> x, T* p, bool stream) {
  stream ? x.stream(p) : x.store(p);
}

#if defined(IK_ISA_AVX512)

IK_INLINE Vec<float> load_first(const float* p, int valid) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << valid) - 1), p);
}
IK_INLINE void store_first(Vec<float> x, float* p, int valid) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << valid) - 1), x.v);
}
IK_INLINE Vec<float> load_vec(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
IK_INLINE Vec<float> load_vec(const Bfloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
IK_INLINE void store_bits(__m256i bits, void* p, bool stream) {
  __m256i* at = reinterpret_cast<__m256i*>(p);
  stream ? _mm256_stream_si256(at, bits) : _mm256_storeu_si256(at, bits);
}
IK_INLINE void store_vec(Vec<float> x, Half* p, bool stream) {
  store_bits(_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT), p, stream);
}
IK_INLINE void store_vec(Vec<float> x, Bfloat16* p, bool stream) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0));
  store_bits(_mm512_cvtepi32_epi16(rounded), p, stream);
}

#elif defined(IK_ISA_AVX2)

IK_INLINE __m256i first_lanes(int valid) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(valid), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
IK_INLINE Vec<float> load_first(const float* p, int valid) {
  return _mm256_maskload_ps(p, first_lanes(valid));
}
IK_INLINE void store_first(Vec<float> x, float* p, int valid) {
  _mm256_maskstore_ps(p, first_lanes(valid), x.v);
}
IK_INLINE Vec<float> load_vec(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
IK_INLINE Vec<float> load_vec(const Bfloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
IK_INLINE void store_bits(__m128i bits, void* p, bool stream) {
  __m128i* at = reinterpret_cast<__m128i*>(p);
  stream ? _mm_stream_si128(at, bits) : _mm_storeu_si128(at, bits);
}
IK_INLINE void store_vec(Vec<float> x, Half* p, bool stream) {
  store_bits(_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT), p, stream);
}
IK_INLINE void store_vec(Vec<float> x, Bfloat16* p, bool stream) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  // packus works within 128-bit halves: the permutation brings the two wanted quarters together.
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0x08);
  store_bits(_mm256_castsi256_si128(packed), p, stream);
}

#else

template <typename S>
IK_INLINE Vec<float> load_halves(const S* p) {
  Vec<float> x;
  for (int i = 0; i < Vec<float>::lanes; ++i) x.v[i] = load_one(p + i);
  return x;
}
IK_INLINE Vec<float> load_vec(const Half* p) { return load_halves(p); }
IK_INLINE Vec<float> load_vec(const Bfloat16* p) { return load_halves(p); }
template <typename S>
IK_INLINE void store_halves(Vec<float> x, S* p) {
  for (int i = 0; i < Vec<float>::lanes; ++i) store_one(x.v[i], p + i);
}
IK_INLINE void store_vec(Vec<float> x, Half* p, bool) { store_halves(x, p); }
IK_INLINE void store_vec(Vec<float> x, Bfloat16* p, bool) { store_halves(x, p); }

#endif

// Calls f(i, count) for runs of at most one vector.
template <typename V, typename F>
IK_INLINE void for_each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) f(i, V::lanes);
  if (i < n) f(i, static_cast<int>(n - i));
}

// Whether whole vectors of S are loaded and stored as such by those who compute in T.
template <typename S, typename T>
constexpr bool kDirect = std::is_same_v<S, T> || (sizeof(T) == 4 && sizeof(S) == 2);

// The first `count` elements, 0 behind them; nothing behind them is touched.
template <typename V, typename S>
IK_INLINE V load_part(const S* p, int count) {
  using T = typename V::Element;
  if constexpr (kDirect<S, T>) {
    if (count == V::lanes) return load_vec(p);
#if defined(IK_ISA_AVX512) || defined(IK_ISA_AVX2)
    if constexpr (std::is_same_v<S, float>) return load_first(p, count);
#endif
  }
  T part[V::lanes] = {};
  for (int i = 0; i < count; ++i) part[i] = static_cast<T>(load_one(p + i));
  return V::load(part);
}
template <typename V, typename S>
IK_INLINE void store_part(V x, S* p, int count) {
  using T = typename V::Element;
  if constexpr (kDirect<S, T>) {
    if (count == V::lanes) return store_vec(x, p, false);
#if defined(IK_ISA_AVX512) || defined(IK_ISA_AVX2)
    if constexpr (std::is_same_v<S, float>) return store_first(x, p, count);
#endif
  }
  T part[V::lanes];
  x.store(part);
  for (int i = 0; i < count; ++i) store_as(part[i], p + i);
}

// Calls f(Stored<S>()) for the type S that `dtype` is stored as.
template <typename S>
struct Stored {
  using type = S;
};
template <typename F>
IK_INLINE auto with_stored(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(Stored<float>());
    case Dtype::f64:
      return f(Stored<double>());
    case Dtype::f16:
      return f(Stored<Half>());
    case Dtype::bf16:
      return f(Stored<Bfloat16>());
    default:
      return f(Stored<uint8_t>());
  }
}

// dst[i] = src[i], i < n.
template <typename T>
IK_NOINLINE void convert_to(Dtype dtype, const void* data, int64_t n, T* dst) {
  with_stored(dtype, [&](auto stored) {
    using S = typename decltype(stored)::type;
    const S* src = static_cast<const S*>(data);
    int64_t i = 0;
    if constexpr (kDirect<S, T>) {
      for (; i + Vec<T>::lanes <= n; i += Vec<T>::lanes) load_vec(src + i).store(dst + i);
    }
#if defined(IK_ISA_AVX2) || defined(IK_ISA_AVX512)
    if constexpr (sizeof(S) == 1 && sizeof(T) == 4) {
      for (; i + 8 <= n; i += 8) {
        const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(src + i));
        _mm256_storeu_ps(dst + i, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)));
      }
    }
#endif
    for (; i < n; ++i) dst[i] = static_cast<T>(load_one(src + i));
  });
}

// dst[i] = bit i of src.
template <typename T>
static void unpack_bits(const uint8_t* src, int64_t n, T* dst) {
  using V = Vec<T>;
  const V one(T(1));
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    uint32_t word = 0;
    for (int g = 0; g < V::lanes / 8; ++g) word |= static_cast<uint32_t>(src[i / 8 + g]) << (8 * g);
    V::signed_by(word, 0, one).store(dst + i);
  }
  for (; i < n; ++i) dst[i] = static_cast<T>((src[i / 8] >> (i % 8)) & 1);
}

// dst[i] = src[i] rounded to nearest even; dst is f16, bf16, f32 or f64.
template <typename T>
IK_NOINLINE void convert_from(Dtype dtype, const T* src, int64_t n, void* data) {
  with_stored(dtype, [&](auto stored) {
    using S = typename decltype(stored)::type;
    S* dst = static_cast<S*>(data);
    int64_t i = 0;
    if constexpr (kDirect<S, T>) {
      for (; i + Vec<T>::lanes <= n; i += Vec<T>::lanes) store_vec(Vec<T>::load(src + i), dst + i, false);
    }
    for (; i < n; ++i) store_as(src[i], dst + i);
  });
}

constexpr Dtype dtype_of(const float*) { return Dtype::f32; }
constexpr Dtype dtype_of(const double*) { return Dtype::f64; }
constexpr Dtype dtype_of(const Half*) { return Dtype::f16; }
constexpr Dtype dtype_of(const Bfloat16*) { return Dtype::bf16; }

// `n` elements at `offset` of `data` as S: in place when stored as S, else converted into `buffer`. A half
// type must be stored as such.
template <typename S>
static const S* fetch(const void* data, Dtype dtype, int64_t offset, int64_t n, S* buffer) {
  if (dtype == dtype_of(buffer)) return static_cast<const S*>(data) + offset;
  if constexpr (sizeof(S) >= 4) {
    if (dtype == Dtype::bits) {
      unpack_bits(static_cast<const uint8_t*>(data) + offset / 8, n, buffer);
    } else {
      convert_to(dtype, static_cast<const char*>(data) + offset * dtype_bytes(dtype), n, buffer);
    }
  }
  return buffer;
}

}  // namespace ik::IK_ISA
