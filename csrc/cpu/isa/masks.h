// What a run of mask values weighs, and masks repeated for interleaved channels.
#pragma once

#include "cpu/isa/convert.h"

namespace ik::IK_ISA {

// dst[3 * i + c] = src[i], i < n: the mask of an interleaved image of three channels.
template <typename T>
static void triple(const T* src, int64_t n, T* dst) {
  int64_t i = 0;
#if defined(IK_ISA_AVX2) || defined(IK_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    const __m256i first = _mm256_setr_epi32(0, 0, 0, 1, 1, 1, 2, 2);
    const __m256i second = _mm256_setr_epi32(2, 3, 3, 3, 4, 4, 4, 5);
    const __m256i third = _mm256_setr_epi32(5, 5, 6, 6, 6, 7, 7, 7);
    for (; i + 8 <= n; i += 8) {
      const __m256 x = _mm256_loadu_ps(src + i);
      _mm256_storeu_ps(dst + 3 * i, _mm256_permutevar8x32_ps(x, first));
      _mm256_storeu_ps(dst + 3 * i + 8, _mm256_permutevar8x32_ps(x, second));
      _mm256_storeu_ps(dst + 3 * i + 16, _mm256_permutevar8x32_ps(x, third));
    }
  }
#endif
  for (; i < n; ++i) dst[3 * i] = dst[3 * i + 1] = dst[3 * i + 2] = src[i];
}

// dst[repeat * i + c] = src[i], i < n.
template <typename T>
static void repeat_each(const T* src, int64_t n, int64_t repeat, T* dst) {
  if (repeat == 3) return triple(src, n, dst);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < repeat; ++c) *dst++ = src[i];
  }
}

// The weights of one run: their sum, the sum of 1 - weight, and whether all are 0 or 1.
struct MaskScan {
  double weight = 0;
  double rest = 0;
  bool binary = true;
};

// Packs the mask into `bits` unless null; those are of use only if it is binary.
template <typename T>
MaskScan scan_mask(const T* mask, int64_t n, uint8_t* bits) {
  using V = Vec<T>;
  const V one(T(1));
  // w^2 - w is 0 for 0 and 1 alone; NaN and Inf make it NaN.
  V weight(T(0)), rest(T(0)), off(T(0));
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    const V w = V::load(mask + i);
    weight = weight + w;
    rest = rest + (one - w);
    off = off + abs_(w * w - w);
    if (bits == nullptr) continue;
    const uint32_t word = w.positive_bits();
    for (int g = 0; g < V::lanes / 8; ++g) bits[i / 8 + g] = static_cast<uint8_t>(word >> (8 * g));
  }
  T tail_weight = T(0), tail_rest = T(0), tail_off = T(0);
  while (i < n) {
    const int64_t end = i + 8 < n ? i + 8 : n;
    uint32_t word = 0;
    for (int64_t at = i; at < end; ++at) {
      const T w = mask[at];
      tail_weight += w;
      tail_rest += T(1) - w;
      tail_off += abs_(w * w - w);
      word |= uint32_t(w > T(0)) << (at - i);
    }
    if (bits != nullptr) bits[i / 8] = static_cast<uint8_t>(word);
    i = end;
  }
  return {weight.sum() + static_cast<double>(tail_weight), rest.sum() + static_cast<double>(tail_rest),
          off.sum() + static_cast<double>(tail_off) == 0};
}

// (hole, valid) weights from the mask value.
template <typename T>
IK_INLINE void split_regions(T mask, T one, bool mask_is_hole, T& hole, T& valid) {
  hole = mask_is_hole ? mask : one - mask;
  valid = mask_is_hole ? one - mask : mask;
}

}  // namespace ik::IK_ISA
