// CPU kernels of Gram matrices and of their gradient.
//
//   G = X X^T, X [C, M]: the lower triangle only, accumulated over parts of the pixels.
//   dX = F X, F symmetric [C, C]: the whole gradient of any loss of G is one product, F = dG + dG^T.
//
// NCHW keeps pixels contiguous, so G is made of dot products along rows; channels_last keeps channels
// contiguous, so it is made of outer products. Neither transposes anything. Half types are converted block by
// block in cache.
#include "cpu/gram_kernels.h"

#include <cstdlib>

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace ik {
namespace IK_ISA {
namespace {

IK_INLINE const char* element(const FeatureMap& map, int64_t index) {
  return static_cast<const char*>(map.data) + index * dtype_bytes(map.dtype);
}

// Rows of a block stay in the second-level cache while the tiles of a band pass over them.
constexpr int64_t kBlockPixels = 2048;
constexpr int64_t kBlockRows = 64;
// Outer products add up one after the other: short blocks keep the rounding at the level of a library
// product.
constexpr int64_t kOuterPixels = 256;

// Lower triangle of rows first .. last of X X^T over `n` pixels; row c starts at x + c * stride.
template <typename T>
void add_dot_products(const T* x, int64_t stride, int64_t channels, int64_t first, int64_t last, int64_t n,
                      T* gram) {
  for (int64_t column_block = 0; column_block < last; column_block += kBlockRows) {
    const int64_t column_end = least(column_block + kBlockRows, last);
    // Rows above the block hold none of its columns.
    for (int64_t i = first > column_block ? first : column_block; i < last; i += kDotRows) {
      const T* rows[kDotRows];
      for (int r = 0; r < kDotRows; ++r) rows[r] = x + least(i + r, last - 1) * stride;
      for (int64_t j = column_block; j < least(column_end, i + kDotRows); j += kDotCols) {
        const T* cols[kDotCols];
        for (int s = 0; s < kDotCols; ++s) cols[s] = x + least(j + s, last - 1) * stride;
        T tile[kDotRows * kDotCols] = {};
        dot_tile(rows, cols, n, tile, kDotCols);
        for (int r = 0; r < kDotRows && i + r < last; ++r) {
          for (int s = 0; s < kDotCols && j + s <= i + r; ++s) {
            gram[(i + r) * channels + j + s] += tile[r * kDotCols + s];
          }
        }
      }
    }
  }
}

// The same from channels_last pixels: pixel k starts at x + k * stride and is zero from C to a multiple of
// the tile.
template <typename T>
void add_outer_products(const T* x, int64_t stride, int64_t channels, int64_t first, int64_t last, int64_t n,
                        T* gram) {
  constexpr int64_t cols = kOuterCols<T>;
  for (int64_t i = first; i < last; i += kOuterRows) {
    for (int64_t j = 0; j < least(last, i + kOuterRows); j += cols) {
      alignas(64) T tile[kOuterRows * cols];
      outer_tile<T, kOuterRows>(x + i, 1, stride, x + j, stride, n, tile, cols);
      for (int64_t r = 0; r < kOuterRows && i + r < last; ++r) {
        for (int64_t s = 0; s < cols && j + s <= i + r; ++s)
          gram[(i + r) * channels + j + s] += tile[r * cols + s];
      }
    }
  }
}

template <typename T>
void gram_units(const GramCall& call, int64_t unit_begin, int64_t unit_end) {
  const FeatureMap& map = call.map;
  const int64_t C = map.channels;
  const int64_t M = map.pixels;
  const int64_t padded = SymmetricProductCall::padded_cols(C);
  const bool native = map.dtype == kNative<T>;
  // channels_last tiles read whole vectors: in place only if C fills them.
  const bool in_place = native && (!map.channels_last || padded == C);
  Scratch<T> scratch(in_place ? 0 : padded * kBlockPixels);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t bands = call.bands();
    const int64_t parts = call.parts();
    const int64_t first = unit % bands * GramCall::band;
    const int64_t last = least(first + GramCall::band, C);
    const int64_t part = unit / bands % parts;
    const int64_t sample = unit / bands / parts;
    T* gram = static_cast<T*>(call.partials) + (sample * parts + part) * C * C;
    for (int64_t i = first * C; i < last * C; ++i) gram[i] = T(0);
    const int64_t end = least((part + 1) * call.part_pixels(), M);
    const int64_t block = map.channels_last ? kOuterPixels : kBlockPixels;
    for (int64_t k = part * call.part_pixels(); k < end; k += block) {
      const int64_t n = least(block, end - k);
      if (!map.channels_last) {
        const int64_t start = sample * C * M + k;
        if (in_place) {
          add_dot_products(reinterpret_cast<const T*>(element(map, start)), M, C, first, last, n, gram);
          continue;
        }
        for (int64_t c = 0; c < last; ++c) {
          convert_to(map.dtype, element(map, start + c * M), n, scratch.get() + c * kBlockPixels);
        }
        add_dot_products(scratch.get(), kBlockPixels, C, first, last, n, gram);
      } else {
        const int64_t start = (sample * M + k) * C;
        if (in_place) {
          add_outer_products(reinterpret_cast<const T*>(element(map, start)), C, C, first, last, n, gram);
          continue;
        }
        for (int64_t m = 0; m < n; ++m) {
          T* row = scratch.get() + m * padded;
          convert_to(map.dtype, element(map, start + m * C), C, row);
          for (int64_t c = C; c < padded; ++c) row[c] = T(0);
        }
        add_outer_products(scratch.get(), padded, C, first, last, n, gram);
      }
    }
  }
}

// Copies a finished tile to the output, dropping what lies outside it and converting the type.
template <typename T>
void store_tile(const T* tile, int64_t tile_stride, int64_t rows, int64_t cols,
                const SymmetricProductCall& call, int64_t index, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    char* at = static_cast<char*>(call.out) + (index + r * stride) * dtype_bytes(call.map.dtype);
    convert_from(call.map.dtype, tile + r * tile_stride, cols, at);
  }
}

template <typename T>
void symmetric_product_units(const SymmetricProductCall& call, int64_t unit_begin, int64_t unit_end) {
  const FeatureMap& map = call.map;
  const int64_t C = map.channels;
  const int64_t M = map.pixels;
  const bool native = map.dtype == kNative<T>;
  constexpr int64_t cols = kOuterCols<T>;
  constexpr int64_t panels = 4;
  const int64_t rows = SymmetricProductCall::padded_rows(C);
  const int64_t stride = SymmetricProductCall::padded_cols(C);
  // NCHW: `panels` panels [C][cols] of pixels. channels_last: kOuterRows * 8 pixels [.., C].
  constexpr int64_t pixel_rows = kOuterRows * 8;
  Scratch<T> scratch(map.channels_last ? pixel_rows * C : panels * C * cols);
  alignas(64) T tile[kOuterRows * cols];
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t sample = unit / call.blocks();
    const int64_t begin = unit % call.blocks() * SymmetricProductCall::block;
    const int64_t end = least(begin + SymmetricProductCall::block, M);
    const T* factor = static_cast<const T*>(call.factor) + sample * rows * stride;
    if (!map.channels_last) {
      for (int64_t m = begin; m < end; m += panels * cols) {
        const int64_t width = least(panels * cols, end - m);
        for (int64_t c = 0; c < C; ++c) {
          const int64_t start = (sample * C + c) * M + m;
          for (int64_t p = 0; p * cols < width; ++p) {
            T* row = scratch.get() + (p * C + c) * cols;
            const int64_t n = least(cols, width - p * cols);
            convert_to(map.dtype, element(map, start + p * cols), n, row);
            for (int64_t i = n; i < cols; ++i) row[i] = T(0);
          }
        }
        for (int64_t c = 0; c < C; c += kOuterRows) {
          for (int64_t p = 0; p * cols < width; ++p) {
            const T* panel = scratch.get() + p * C * cols;
            const int64_t index = (sample * C + c) * M + m + p * cols;
            const bool whole = native && c + kOuterRows <= C && (p + 1) * cols <= width;
            T* out = whole ? static_cast<T*>(call.out) + index : tile;
            outer_tile<T, kOuterRows>(factor + c * stride, stride, 1, panel, cols, C, out, whole ? M : cols);
            if (!whole) {
              store_tile(tile, cols, least(kOuterRows, C - c), least(cols, width - p * cols), call, index, M);
            }
          }
        }
      }
    } else {
      for (int64_t m = begin; m < end; m += pixel_rows) {
        const int64_t height = least(pixel_rows, end - m);
        const T* x = reinterpret_cast<const T*>(element(map, (sample * M + m) * C));
        if (!native || height < pixel_rows) {
          convert_to(map.dtype, element(map, (sample * M + m) * C), height * C, scratch.get());
          for (int64_t i = height * C; i < pixel_rows * C; ++i) scratch.get()[i] = T(0);
          x = scratch.get();
        }
        for (int64_t c = 0; c < C; c += cols) {
          for (int64_t r = 0; r < height; r += kOuterRows) {
            const int64_t index = (sample * M + m + r) * C + c;
            const bool whole = native && c + cols <= C && r + kOuterRows <= height;
            T* out = whole ? static_cast<T*>(call.out) + index : tile;
            outer_tile<T, kOuterRows>(x + r * C, C, 1, factor + c, stride, C, out, whole ? C : cols);
            if (!whole)
              store_tile(tile, cols, least(kOuterRows, height - r), least(cols, C - c), call, index, C);
          }
        }
      }
    }
  }
}

}  // namespace

const GramKernels gram_kernels = {gram_units<float>, symmetric_product_units<float>};
#if defined(IK_ISA_GENERIC)
const GramKernels gram_kernels_wide = {gram_units<double>, symmetric_product_units<double>};
#endif

}  // namespace IK_ISA
}  // namespace ik
