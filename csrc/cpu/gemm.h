// Register tiles of the Gram kernels: small matrix products whose operands stay where they are.
#pragma once

#include "cpu/vec.h"

namespace ik {
namespace IK_ISA {

// Rows x columns of a tile, sized to the register file: 16 + 8 of 32 registers with AVX-512, 8 + 6 of 16
// else.
#if defined(IK_ISA_AVX512)
constexpr int kDotRows = 4;
constexpr int kDotCols = 4;
constexpr int kOuterRows = 8;
#else
constexpr int kDotRows = 2;
constexpr int kDotCols = 4;
constexpr int kOuterRows = 4;
#endif
constexpr int kOuterVectors = 2;
template <typename T>
constexpr int kOuterCols = kOuterVectors * Vec<T>::lanes;

// out[r * ldo + s] += sum_k rows[r][k] * cols[s][k], k < n: both operands are contiguous along k, so that
// lanes hold partial sums along k and no operand is transposed. The lanes are added up in a fixed order at
// the end.
template <typename T>
IK_INLINE void dot_tile(const T* const* rows, const T* const* cols, int64_t n, T* out, int64_t ldo) {
  using V = Vec<T>;
  V sums[kDotRows][kDotCols];
  for (int r = 0; r < kDotRows; ++r) {
    for (int s = 0; s < kDotCols; ++s) sums[r][s] = V(T(0));
  }
  int64_t k = 0;
  for (; k + V::lanes <= n; k += V::lanes) {
    V b[kDotCols];
    for (int s = 0; s < kDotCols; ++s) b[s] = V::load(cols[s] + k);
    for (int r = 0; r < kDotRows; ++r) {
      const V a = V::load(rows[r] + k);
      for (int s = 0; s < kDotCols; ++s) sums[r][s] = fma_(a, b[s], sums[r][s]);
    }
  }
  for (int r = 0; r < kDotRows; ++r) {
    for (int s = 0; s < kDotCols; ++s) {
      T tail = T(0);
      for (int64_t i = k; i < n; ++i) tail += rows[r][i] * cols[s][i];
      out[r * ldo + s] += sums[r][s].lane_sum() + tail;
    }
  }
}

// out[r * ldo + c] = sum_k a[r * a_row + k * a_k] * b[k * b_k + c] for kOuterRows rows and kOuterCols
// columns: the columns of b are contiguous.
template <typename T, int Rows>
IK_INLINE void outer_tile(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_k, int64_t n, T* out,
                          int64_t ldo) {
  using V = Vec<T>;
  V sums[Rows][kOuterVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kOuterVectors; ++v) {
      sums[r][v] = V(T(0));
    }
  }
  for (int64_t k = 0; k < n; ++k) {
    V column[kOuterVectors];
    for (int v = 0; v < kOuterVectors; ++v) column[v] = V::load(b + k * b_k + v * V::lanes);
    for (int r = 0; r < Rows; ++r) {
      const V value(a[r * a_row + k * a_k]);
      for (int v = 0; v < kOuterVectors; ++v) sums[r][v] = fma_(value, column[v], sums[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kOuterVectors; ++v) sums[r][v].store(out + r * ldo + v * V::lanes);
  }
}

}  // namespace IK_ISA
}  // namespace ik
