// Transposition of a square block of vectors in registers.
#pragma once

#include "cpu/isa/vec.h"

namespace ik::IK_ISA {

template <typename T>
IK_INLINE void transpose(Vec<T>* rows) {
  constexpr int L = Vec<T>::lanes;
  T block[L][L];
  for (int i = 0; i < L; ++i) rows[i].store(block[i]);
  for (int i = 0; i < L; ++i) {
    T column[L];
    for (int j = 0; j < L; ++j) column[j] = block[j][i];
    rows[i] = Vec<T>::load(column);
  }
}

#if defined(IK_ISA_AVX512)

// Pairs of rows, then pairs of pairs within 128 bits, then the 128-bit quarters: 64 shuffles for 256
// elements.
IK_INLINE void transpose(Vec<float>* rows) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // b[4 * q + r] holds in quarter k column 4 * k + r of rows 4 * q .. 4 * q + 3.
  for (int r = 0; r < 4; ++r) {
    const __m512 even_low = _mm512_shuffle_f32x4(b[r], b[4 + r], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(b[r], b[4 + r], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(b[8 + r], b[12 + r], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(b[8 + r], b[12 + r], 0xdd);
    rows[r].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    rows[8 + r].v = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    rows[4 + r].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    rows[12 + r].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

#elif defined(IK_ISA_AVX2)

IK_INLINE void transpose(Vec<float>* rows) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d low = _mm256_castps_pd(a[i + j]), high = _mm256_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  for (int r = 0; r < 4; ++r) {
    rows[r].v = _mm256_permute2f128_ps(b[r], b[4 + r], 0x20);
    rows[4 + r].v = _mm256_permute2f128_ps(b[r], b[4 + r], 0x31);
  }
}

#endif

}  // namespace ik::IK_ISA
