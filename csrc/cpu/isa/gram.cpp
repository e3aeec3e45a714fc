// CPU kernels of Gram matrices and of their gradient.
//
//   G = X X^T, X [C, M]: the lower triangle only, accumulated over parts of the pixels.
//   dX = F X, F symmetric [C, C]: the whole gradient of any loss of G is one product, F = dG + dG^T.
//
// NCHW keeps pixels contiguous, so G is made of dot products along rows; channels_last keeps channels
// contiguous, so it is made of outer products. Only maps of few pixels are transposed. Half types are
// converted block by block in cache.
#include "cpu/gram.h"

#include <cstdlib>

#include "cpu/isa/gemm.h"

namespace ik::IK_ISA {
namespace {

IK_INLINE const char* element(const FeatureMap& map, int64_t index) {
  return static_cast<const char*>(map.data) + index * dtype_bytes(map.dtype);
}

// Runs of a kibibyte in planes far apart, which the hardware does not foresee: fetching the next while one is
// copied made the product 7 % faster (8 maps 128x64x64, two Zen 3 cores). Forward, with runs of a page, it
// gained nothing.
IK_INLINE void fetch_run(const FeatureMap& map, int64_t index, int64_t n) {
  const char* run = element(map, index);
  for (int64_t byte = 0; byte < n * dtype_bytes(map.dtype); byte += 64) __builtin_prefetch(run + byte, 0, 2);
}

// Rows of a block stay in the second-level cache while the tiles of a band pass over them, those of a tile in
// the first. They are copied to rows of their own: planes as large as a power of two would all lie in a few
// sets of either.
constexpr int64_t kBlockPixels = 1024;
constexpr int64_t kBlockStride = kBlockPixels + 16;
constexpr int64_t kBlockRows = 48;
static_assert(kBlockRows % kDotRows == 0 && kBlockRows % kDotCols == 0, "tiles would overlap");
// Outer products add up one after the other: short blocks keep the rounding at the level of a library
// product.
constexpr int64_t kOuterPixels = 128;

// Lower triangle of rows first .. last of X X^T over `n` pixels; row c starts at x + c * kBlockStride.
template <typename T>
void add_dot_products(const T* x, int64_t channels, int64_t first, int64_t last, int64_t n, T* gram) {
  for (int64_t column_block = 0; column_block < last; column_block += kBlockRows) {
    const int64_t column_end = least(column_block + kBlockRows, last);
    // Rows above the block hold none of its columns.
    for (int64_t i = first > column_block ? first : column_block; i < last; i += kDotRows) {
      const T* rows[kDotRows];
      for (int r = 0; r < kDotRows; ++r) rows[r] = x + least(i + r, last - 1) * kBlockStride;
      for (int64_t j = column_block; j < least(column_end, i + kDotRows); j += kDotCols) {
        const T* cols[kDotCols];
        for (int s = 0; s < kDotCols; ++s) cols[s] = x + least(j + s, last - 1) * kBlockStride;
        T tile[kDotRows * kDotCols];
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

// The same from panels of channels, each [n][kOuterCols], `panel_stride` apart. What it adds above the
// diagonal is not read.
template <typename T>
void add_outer_products(const T* panels, int64_t panel_stride, int64_t channels, int64_t first, int64_t last,
                        int64_t n, T* gram) {
  constexpr int64_t cols = kOuterCols<T>;
  for (int64_t j = 0; j < last; j += cols) {
    const T* panel = panels + j / cols * panel_stride;
    const int64_t above =
        j > first ? (j - first) / kOuterRows * kOuterRows : 0;  // rows without a column here
    for (int64_t i = first + above; i < last; i += kOuterRows) {
      const T* rows[kOuterRows];
      for (int r = 0; r < kOuterRows; ++r) {
        const int64_t row = least(i + r, last - 1);
        rows[r] = panels + row / cols * panel_stride + row % cols;
      }
      T* out = gram + i * channels + j;
      if (i + kOuterRows <= last && j + cols <= channels) {
        outer_tile<Store::add>(rows, cols, panel, n, out, channels);
        continue;
      }
      alignas(64) T tile[kOuterRows * cols];
      outer_tile<Store::set>(rows, cols, panel, n, tile, cols);
      for (int64_t r = 0; r < kOuterRows && i + r < last; ++r) {
        for (int64_t s = 0; s < cols && j + s < channels; ++s) out[r * channels + s] += tile[r * cols + s];
      }
    }
  }
}

// Pixels k .. k + n of channels 0 .. last as panels, zero beyond the last channel.
template <typename T>
void pack_panels(const FeatureMap& map, int64_t sample, int64_t k, int64_t n, int64_t last,
                 int64_t panel_stride, T* converted, T* panels) {
  constexpr int64_t cols = kOuterCols<T>;
  const int64_t C = map.channels;
  const int64_t M = map.pixels;
  auto values = [&](int64_t index, int64_t count) {
    return fetch(map.data, map.dtype, index, count, converted);
  };
  if (map.channels_last) {
    for (int64_t m = 0; m < n; ++m) {
      const T* row = values((sample * M + k + m) * C, last);
      T* panel = panels + m * cols;
      for (int64_t c = 0; c < last; c += cols, panel += panel_stride) pack_columns(row + c, last - c, panel);
    }
    return;
  }
  for (int64_t c = 0; c < (last + cols - 1) / cols * cols; ++c) {
    const T* plane = c < last ? values((sample * C + c) * M + k, n) : nullptr;
    T* column = panels + c / cols * panel_stride + c % cols;
    for (int64_t m = 0; m < n; ++m) column[m * cols] = plane == nullptr ? T(0) : plane[m];
  }
}

template <typename T>
void gram_units(const GramCall& call, int64_t unit_begin, int64_t unit_end) {
  const FeatureMap& map = call.map;
  const int64_t C = map.channels;
  const int64_t M = map.pixels;
  constexpr int64_t cols = kOuterCols<T>;
  // Of few pixels, too: a dot product would cost more for adding up its lanes than for its products.
  const bool outer = map.channels_last || M <= kOuterPixels;
  const int64_t block = outer ? least(kOuterPixels, M) : kBlockPixels;
  // With a cache line between panels, so that the same pixel of several panels lies in different sets.
  const int64_t panel_stride = block * cols + 16;
  Scratch<T> scratch(!outer ? C * kBlockStride : map.channels_last ? C : block);
  Scratch<T> panels(outer ? (C + cols - 1) / cols * panel_stride : 0);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t bands = call.bands();
    const int64_t parts = call.parts();
    const int64_t first = balanced(unit % bands, bands) * GramCall::band;
    const int64_t last = least(first + GramCall::band, C);
    const int64_t part = unit / bands % parts;
    const int64_t sample = unit / bands / parts;
    T* gram = static_cast<T*>(call.partials) + (sample * parts + part) * C * C;
    for (int64_t i = first * C; i < last * C; ++i) gram[i] = T(0);
    const int64_t end = least((part + 1) * call.part_pixels(), M);
    for (int64_t k = part * call.part_pixels(); k < end; k += block) {
      const int64_t n = least(block, end - k);
      if (outer) {
        pack_panels(map, sample, k, n, last, panel_stride, scratch.get(), panels.get());
        add_outer_products(panels.get(), panel_stride, C, first, last, n, gram);
        continue;
      }
      for (int64_t c = 0; c < last; ++c) {
        const char* row = element(map, (sample * C + c) * M + k);
        convert_to(map.dtype, row, n, scratch.get() + c * kBlockStride);
      }
      add_dot_products(scratch.get(), C, first, last, n, gram);
    }
  }
}

// Of one block: pixels of a channels_last map, panels of pixels of planes.
constexpr int64_t kPixelRows = kOuterRows * 8;
template <typename T>
int64_t panel_count(int64_t channels) {
  const int64_t panels = (128 << 10) / (channels * kOuterCols<T> * static_cast<int64_t>(sizeof(T)));
  return panels < 2 ? 2 : least(panels, 15);
}

// A tile of the product at element `index` of the output, whose rows are `stride` apart; of it `height` rows
// and `width` columns lie inside. `stream`: whole tiles are aligned and go around the cache.
template <typename T>
IK_INLINE void product_tile(const SymmetricProductCall& call, const T* const* rows, const T* panel,
                            int64_t index, int64_t stride, int64_t height, int64_t width, bool stream) {
  constexpr int64_t cols = kOuterCols<T>;
  const int64_t C = call.map.channels;
  if (call.map.dtype == kNative<T> && height >= kOuterRows && width >= cols) {
    T* out = static_cast<T*>(call.out) + index;
    return stream ? outer_tile<Store::stream>(rows, 1, panel, C, out, stride)
                  : outer_tile<Store::set>(rows, 1, panel, C, out, stride);
  }
  alignas(64) T tile[kOuterRows * cols];
  outer_tile<Store::set>(rows, 1, panel, C, tile, cols);
  for (int64_t r = 0; r < least(kOuterRows, height); ++r) {
    char* at = static_cast<char*>(call.out) + (index + r * stride) * dtype_bytes(call.map.dtype);
    convert_from(call.map.dtype, tile + r * cols, least(cols, width), at);
  }
}

// out[c] = sum_k factor[c, k] * x[k] over planes of pixels: panels of pixels, as many as stay in the
// second-level cache.
template <typename T>
void product_of_planes(const SymmetricProductCall& call, const T* factor, int64_t sample, int64_t begin,
                       int64_t end, int64_t first, int64_t last, T* scratch) {
  constexpr int64_t cols = kOuterCols<T>;
  const FeatureMap& map = call.map;
  const int64_t C = map.channels;
  const int64_t M = map.pixels;
  const int64_t stride = SymmetricProductCall::padded_cols(C);
  const bool stream = call.stream && aligned(call.out) && M * sizeof(T) % 64 == 0;
  for (int64_t m = begin; m < end; m += panel_count<T>(C) * cols) {
    const int64_t width = least(panel_count<T>(C) * cols, end - m);
    T* converted = scratch + panel_count<T>(C) * C * cols;
    for (int64_t c = 0; c < C; ++c) {
      const int64_t run = (sample * C + c) * M + m;
      if (c + 1 < C) fetch_run(map, run + M, width);
      const T* row = fetch(map.data, map.dtype, run, width, converted);
      for (int64_t p = 0; p < width; p += cols) pack_columns(row + p, width - p, scratch + p * C + c * cols);
    }
    for (int64_t p = 0; p < width; p += cols) {
      for (int64_t c = first; c < last; c += kOuterRows) {
        const int64_t index = (sample * C + c) * M + m + p;
        const T* rows[kOuterRows];
        for (int r = 0; r < kOuterRows; ++r) rows[r] = factor + least(c + r, last - 1) * stride;
        product_tile(call, rows, scratch + p * C, index, M, last - c, width - p, stream);
      }
    }
  }
}

// out[m] = x[m] * factor over channels_last pixels, from panels of the factor.
template <typename T>
void product_of_pixels(const SymmetricProductCall& call, const T* panels, int64_t sample, int64_t begin,
                       int64_t end, int64_t first, int64_t last, T* scratch) {
  constexpr int64_t cols = kOuterCols<T>;
  const FeatureMap& map = call.map;
  const int64_t C = map.channels;
  const int64_t M = map.pixels;
  const bool stream = call.stream && aligned(call.out) && C * sizeof(T) % 64 == 0;
  for (int64_t m = begin; m < end; m += kPixelRows) {
    const int64_t height = least(kPixelRows, end - m);
    const T* x = fetch(map.data, map.dtype, (sample * M + m) * C, height * C, scratch);
    for (int64_t c = first; c < last; c += cols) {
      for (int64_t r = 0; r < height; r += kOuterRows) {
        const int64_t index = (sample * M + m + r) * C + c;
        const T* rows[kOuterRows];
        for (int i = 0; i < kOuterRows; ++i) rows[i] = x + least(r + i, height - 1) * C;
        product_tile(call, rows, panels + c * C, index, C, height - r, last - c, stream);
      }
    }
  }
}

template <typename T>
void symmetric_product_units(const SymmetricProductCall& call, int64_t unit_begin, int64_t unit_end) {
  const int64_t C = call.map.channels;
  const int64_t stride = SymmetricProductCall::padded_cols(C);
  constexpr int64_t cols = kOuterCols<T>;
  const bool by_pixel = call.map.channels_last;
  const bool native = call.map.dtype == kNative<T>;
  Scratch<T> scratch(by_pixel ? (native ? 0 : kPixelRows * C) : panel_count<T>(C) * (C + 1) * cols);
  Scratch<T> panels(by_pixel ? C * stride : 0);  // [stride / cols][C][cols]
  int64_t packed = -1;                           // sample and band of the factor in the panels
  const int64_t bands = call.bands();
  const int64_t width = bands == 1 ? C : SymmetricProductCall::band;
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    const int64_t band = unit % bands;
    const int64_t sample = unit / bands / call.blocks();
    const int64_t begin = unit / bands % call.blocks() * SymmetricProductCall::block;
    const int64_t end = least(begin + SymmetricProductCall::block, call.map.pixels);
    const int64_t first = band * width;
    const int64_t last = least(first + width, C);
    const T* factor = static_cast<const T*>(call.factor) + sample * C * stride;
    if (!by_pixel) {
      product_of_planes(call, factor, sample, begin, end, first, last, scratch.get());
      continue;
    }
    if (packed != sample * bands + band) {
      for (int64_t k = 0; k < C; ++k) {
        for (int64_t c = first; c < last; c += cols) {
          pack_columns(factor + k * stride + c, cols, panels.get() + c * C + k * cols);
        }
      }
      packed = sample * bands + band;
    }
    product_of_pixels(call, panels.get(), sample, begin, end, first, last, scratch.get());
  }
  end_stream(call.stream);
}

}  // namespace

template <typename T>
constexpr GramKernels kKernels = {gram_units<T>, symmetric_product_units<T>};
IK_DEFINE_PER_ISA(GramKernels, gram_kernels, kKernels)

}  // namespace ik::IK_ISA
