// Packed signs as bytes +1, 0, -1: neighbours are then bytes a few places apart, whatever their bits were,
// and sums of signs are one instruction for 32 elements.
#pragma once

#include "cpu/isa/scratch.h"

namespace ik::IK_ISA {
namespace {

// Elements unpacked at a time; a row of bytes may be written up to so many beyond its end, with zeros.
constexpr int64_t kSignBlock = 64;

#if defined(IK_ISA_AVX512)
IK_INLINE void unpack_block(uint64_t positive, uint64_t negative, int8_t* out) {
  _mm512_storeu_si512(out, _mm512_sub_epi8(_mm512_movm_epi8(negative), _mm512_movm_epi8(positive)));
}
#elif defined(IK_ISA_AVX2)
// -1 in every byte whose bit is set.
IK_INLINE __m256i spread_bits(uint32_t bits) {
  const __m256i bytes =
      _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i place = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), bytes);
  return _mm256_cmpeq_epi8(_mm256_and_si256(spread, place), place);
}
IK_INLINE void unpack_block(uint64_t positive, uint64_t negative, int8_t* out) {
  for (int half = 0; half < 2; ++half) {
    const __m256i plus = spread_bits(static_cast<uint32_t>(positive >> (32 * half)));
    const __m256i minus = spread_bits(static_cast<uint32_t>(negative >> (32 * half)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * half), _mm256_sub_epi8(minus, plus));
  }
}
#else
IK_INLINE void unpack_block(uint64_t positive, uint64_t negative, int8_t* out) {
  for (int i = 0; i < kSignBlock; ++i) {
    out[i] =
        static_cast<int8_t>(static_cast<int>((positive >> i) & 1) - static_cast<int>((negative >> i) & 1));
  }
}
#endif

// A row of signs, `groups` bytes of each plane.
static void unpack_signs(const uint8_t* positive, const uint8_t* negative, int64_t groups, int8_t* out) {
  uint64_t plus, minus;
  int64_t g = 0;
  for (; g + 8 <= groups; g += 8) {
    std::memcpy(&plus, positive + g, 8);
    std::memcpy(&minus, negative + g, 8);
    unpack_block(plus, minus, out + 8 * g);
  }
  if (g == groups) return;
  plus = minus = 0;
  std::memcpy(&plus, positive + g, static_cast<size_t>(groups - g));
  std::memcpy(&minus, negative + g, static_cast<size_t>(groups - g));
  unpack_block(plus, minus, out + 8 * g);
}

// A vector of signs, or of a - b; whole vectors are read.
template <typename V>
IK_INLINE V load_signs(const int8_t* a) {
  float values[V::lanes];
  for (int i = 0; i < V::lanes; ++i) values[i] = static_cast<float>(a[i]);
  V signs;
  for (int i = 0; i < V::lanes; ++i) signs.v[i] = values[i];
  return signs;
}
template <typename V>
IK_INLINE V load_difference(const int8_t* a, const int8_t* b) {
  return load_signs<V>(a) - load_signs<V>(b);
}
#if defined(IK_ISA_AVX512)
IK_INLINE Vec<float> from_bytes(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
IK_INLINE __m128i load_bytes(const int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
#elif defined(IK_ISA_AVX2)
IK_INLINE Vec<float> from_bytes(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); }
IK_INLINE __m128i load_bytes(const int8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
#endif
#if defined(IK_ISA_AVX)
template <>
IK_MEMBER Vec<float> load_signs<Vec<float>>(const int8_t* a) {
  return from_bytes(load_bytes(a));
}
template <>
IK_MEMBER Vec<float> load_difference<Vec<float>>(const int8_t* a, const int8_t* b) {
  return from_bytes(_mm_sub_epi8(load_bytes(a), load_bytes(b)));
}
#endif

}  // namespace
}  // namespace ik::IK_ISA
