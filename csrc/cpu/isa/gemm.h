// Register tiles of the Gram kernels: small matrix products whose operands stay where they are.
#pragma once

#include "cpu/isa/convert.h"
#include "cpu/isa/scratch.h"

namespace ik::IK_ISA {

// Rows x columns of a tile, sized to the register file: sums and operands of 32 registers with AVX-512, of 16
// else. The tiles for AVX2 fill it (12 sums, 3 + 1 or 2 + 1 operands): 8 sums are fewer than its two units of
// 4 cycles latency need once a load is late.
#if defined(IK_ISA_AVX512)
constexpr int kDotRows = 4;
constexpr int kDotCols = 4;
constexpr int kOuterRows = 8;
#elif defined(IK_ISA_AVX2)
constexpr int kDotRows = 4;
constexpr int kDotCols = 3;
constexpr int kOuterRows = 6;
#else
constexpr int kDotRows = 2;
constexpr int kDotCols = 4;
constexpr int kOuterRows = 4;
#endif
constexpr int kOuterVectors = 2;
template <typename T>
constexpr int kOuterCols = kOuterVectors * Vec<T>::lanes;

// out[r * ldo + s] = sum_k rows[r][k] * cols[s][k], k < n: both operands are contiguous along k, so that
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
      out[r * ldo + s] = sums[r][s].lane_sum() + tail;
    }
  }
}

enum class Store { set, add, stream };

// out[r * ldo + c] = sum_k rows[r][k * step] * panel[k * kOuterCols + c] for kOuterRows rows and kOuterCols
// columns, or added to what is there, or written around the cache. The panel is contiguous: rows of a matrix
// as wide as a power of two would all lie in a few sets of the first-level cache.
template <Store kStore, typename T>
IK_INLINE void outer_tile(const T* const* rows, int64_t step, const T* panel, int64_t n, T* out,
                          int64_t ldo) {
  using V = Vec<T>;
  V sums[kOuterRows][kOuterVectors];
  for (int r = 0; r < kOuterRows; ++r) {
    for (int v = 0; v < kOuterVectors; ++v) {
      sums[r][v] = V(T(0));
    }
  }
  for (int64_t k = 0; k < n; ++k) {
    V column[kOuterVectors];
    for (int v = 0; v < kOuterVectors; ++v) column[v] = V::load(panel + k * kOuterCols<T> + v * V::lanes);
    for (int r = 0; r < kOuterRows; ++r) {
      const V value(rows[r][k * step]);
      for (int v = 0; v < kOuterVectors; ++v) sums[r][v] = fma_(value, column[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kOuterRows; ++r) {
    for (int v = 0; v < kOuterVectors; ++v) {
      T* at = out + r * ldo + v * V::lanes;
      if constexpr (kStore == Store::stream) {
        sums[r][v].stream(at);
      } else {
        (kStore == Store::add ? V::load(at) + sums[r][v] : sums[r][v]).store(at);
      }
    }
  }
}

// Columns of a panel from a row of a matrix, zero beyond `n`.
template <typename T>
IK_INLINE void pack_columns(const T* row, int64_t n, T* panel) {
  using V = Vec<T>;
  for (int64_t i = 0; i < kOuterCols<T>; i += V::lanes) {
    (i < n ? load_part<V>(row + i, static_cast<int>(least(V::lanes, n - i))) : V(T(0))).store(panel + i);
  }
}

}  // namespace ik::IK_ISA
