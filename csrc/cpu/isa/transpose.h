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

#if defined(IK_ISA_AVX)

// Pairs of rows, then pairs of pairs within 128 bits, then the parts of 128 bits: with AVX-512 64 shuffles for
// 256 elements.
IK_INLINE void transpose(Vec<float>* rows) {
  constexpr int L = Vec<float>::lanes;
  Register a[L], b[L];
  for (int i = 0; i < L; i += 2) {
    a[i] = IK_MM(unpacklo_ps)(rows[i].v, rows[i + 1].v);
    a[i + 1] = IK_MM(unpackhi_ps)(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < L; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const auto low = IK_MM(castps_pd)(a[i + j]), high = IK_MM(castps_pd)(a[i + j + 2]);
      b[i + 2 * j] = IK_MM(castpd_ps)(IK_MM(unpacklo_pd)(low, high));
      b[i + 2 * j + 1] = IK_MM(castpd_ps)(IK_MM(unpackhi_pd)(low, high));
    }
  }
  // b[4 * q + r] holds in part k column 4 * k + r of rows 4 * q .. 4 * q + 3.
  for (int r = 0; r < 4; ++r) {
#if defined(IK_ISA_AVX512)
    const Register even_low = _mm512_shuffle_f32x4(b[r], b[4 + r], 0x88);
    const Register odd_low = _mm512_shuffle_f32x4(b[r], b[4 + r], 0xdd);
    const Register even_high = _mm512_shuffle_f32x4(b[8 + r], b[12 + r], 0x88);
    const Register odd_high = _mm512_shuffle_f32x4(b[8 + r], b[12 + r], 0xdd);
    rows[r].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    rows[8 + r].v = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    rows[4 + r].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    rows[12 + r].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
#else
    rows[r].v = _mm256_permute2f128_ps(b[r], b[4 + r], 0x20);
    rows[4 + r].v = _mm256_permute2f128_ps(b[r], b[4 + r], 0x31);
#endif
  }
}

#endif

}  // namespace ik::IK_ISA
