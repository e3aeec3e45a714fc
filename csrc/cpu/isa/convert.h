// Conversion between storage types and the accumulation type, a run of elements at a time.
#pragma once

#include <type_traits>

#include "cpu/isa/vec.h"
#include "cpu/kernels.h"

namespace ik::IK_ISA {

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
template <typename S>
constexpr Dtype kNative = std::is_same_v<S, Half>       ? Dtype::f16
                          : std::is_same_v<S, Bfloat16> ? Dtype::bf16
                          : sizeof(S) == 4              ? Dtype::f32
                                                        : Dtype::f64;

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

#if defined(IK_ISA_AVX)

IK_INLINE Vec<float> load_vec(const Half* p) { return IK_MM(cvtph_ps)(load_halves(p)); }
IK_INLINE Vec<float> load_vec(const Bfloat16* p) {
  return reinterpret_cast<Register>(IK_MM(slli_epi32)(IK_MM(cvtepu16_epi32)(load_halves(p)), 16));
}
IK_INLINE void store_vec(Vec<float> x, Half* p, bool stream) {
  store_halves(IK_MM(cvtps_ph)(x.v, _MM_FROUND_TO_NEAREST_INT), p, stream);
}
IK_INLINE void store_vec(Vec<float> x, Bfloat16* p, bool stream) {
  const Integers bits = reinterpret_cast<Integers>(x.v);
  const Integers odd = IK_MM(srli_epi32)(bits, 16) & IK_MM(set1_epi32)(1);
  const Integers up = IK_MM(add_epi32)(bits, IK_MM(add_epi32)(odd, IK_MM(set1_epi32)(0x7fff)));
  const Lanes nan = compare<_CMP_UNORD_Q>(x.v, x.v);
  const Register rounded = choose(nan, reinterpret_cast<Register>(IK_MM(set1_epi32)(0x7fc0)),
                                  reinterpret_cast<Register>(IK_MM(srli_epi32)(up, 16)));
  store_halves(low_halves(reinterpret_cast<Integers>(rounded)), p, stream);
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
#if defined(IK_ISA_AVX)
    if constexpr (std::is_same_v<S, float>) return load_first(p, count);
#endif
  }
  T part[V::lanes] = {};
  for (int i = 0; i < count; ++i) part[i] = static_cast<T>(load_one(p + i));
  return V::load(part);
}
// `stream`: whole vectors go around the cache.
template <typename V, typename S>
IK_INLINE void store_part(V x, S* p, int count, bool stream = false) {
  using T = typename V::Element;
  if constexpr (kDirect<S, T>) {
    if (count == V::lanes) return store_vec(x, p, stream);
#if defined(IK_ISA_AVX)
    if constexpr (std::is_same_v<S, float>) return store_first(x.v, p, count);
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

// Calls f with the type that stands for `value`.
template <typename F>
IK_INLINE void with_bool(bool value, const F& f) {
  value ? f(std::true_type()) : f(std::false_type());
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

// `n` elements at `offset` of `data` as S: in place when stored as S, else converted into `buffer`. A half
// type must be stored as such.
template <typename S>
static const S* fetch(const void* data, Dtype dtype, int64_t offset, int64_t n, S* buffer) {
  if (dtype == kNative<S>) return static_cast<const S*>(data) + offset;
  if constexpr (sizeof(S) >= 4) {
    if (dtype == Dtype::bits) {
      unpack_bits(static_cast<const uint8_t*>(data) + offset / 8, n, buffer);
    } else {
      convert_to(dtype, static_cast<const char*>(data) + offset * dtype_bytes(dtype), n, buffer);
    }
  }
  return buffer;
}

// Where results for `offset` of `data` are computed: in place when stored as S, else in `buffer`, out of which
// store_output converts them. Null without `data`.
template <typename S>
static S* output_at(void* data, Dtype dtype, int64_t offset, S* buffer) {
  if (data == nullptr) return nullptr;
  return dtype == kNative<S> ? static_cast<S*>(data) + offset : buffer;
}
template <typename S>
static void store_output(void* data, Dtype dtype, int64_t offset, int64_t n, const S* buffer) {
  if constexpr (sizeof(S) >= 4) {
    if (data == nullptr || dtype == kNative<S>) return;
    convert_from(dtype, buffer, n, static_cast<char*>(data) + offset * dtype_bytes(dtype));
  }
}

}  // namespace ik::IK_ISA
