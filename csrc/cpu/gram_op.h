// From torch tensors to the Gram kernels: what the ops gram and style share.
#pragma once

#include "cpu/gram.h"
#include "cpu/tensors.h"

namespace ik {

// A feature tensor in the layout of its memory; a tensor that is neither NCHW nor channels_last is copied to
// NCHW.
struct Features {
  Tensor ready;
  FeatureMap map;
  std::vector<int64_t> size;
  bool channels_last = false;

  explicit Features(const Tensor& tensor) : ready(tensor) {
    STD_TORCH_CHECK(tensor.dim() == 4, "features must have 4 dimensions (N, C, H, W)");
    size.assign(tensor.sizes().begin(), tensor.sizes().end());
    channels_last = !tensor.is_contiguous() && is_channels_last(tensor);
    ready = in_layout(tensor, channels_last);
    map.data = ready.const_data_ptr();
    map.dtype = dtype_code(tensor.scalar_type());
    map.samples = size[0];
    map.channels = size[1];
    map.pixels = size[2] * size[3];
    map.channels_last = channels_last;
  }
};

// Units of about `flops` floating-point operations each for one thread.
static inline int64_t grain_of_flops(double flops) {
  return static_cast<int64_t>(1e6 / std::max(flops, 1.0)) + 1;
}

// Items of `entries` matrix entries each for one thread.
static inline int64_t grain_of(int64_t entries) { return 16384 / std::max<int64_t>(entries, 1) + 1; }

// Lower triangles of X X^T of every sample, unscaled: of one part of the pixels as the kernel leaves them, of
// several added up in double.
template <typename T>
struct GramSums {
  int64_t samples;
  int64_t channels;
  int64_t parts;
  std::unique_ptr<T[]> partials;   // [N, parts, C, C]
  std::unique_ptr<double[]> sums;  // [N, C, C]

  explicit GramSums(const FeatureMap& map) : samples(map.samples), channels(map.channels) {
    GramCall call;
    call.map = map;
    parts = call.parts();
    partials.reset(new T[static_cast<size_t>(samples * parts * channels * channels)]);
    call.partials = partials.get();
    const double rows = static_cast<double>(std::min(GramCall::band, channels));
    const double pixels = static_cast<double>(channels * std::min(call.part_pixels(), map.pixels));
    run_units(call, IK_PICK_ISA(gram_kernels, sizeof(T) == 8).gram, call.units(),
              grain_of_flops(rows * pixels));
  }

  bool whole() const { return parts == 1; }

  const double* wide() {
    sums.reset(new double[static_cast<size_t>(samples * channels * channels)]);
    auto add = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % channels;
        const T* part = partials.get() + (i / channels * parts * channels + row) * channels;
        double* sum = sums.get() + i * channels;
        for (int64_t j = 0; j <= row; ++j) sum[j] = 0;
        for (int64_t p = 0; p < parts; ++p, part += channels * channels) {
          for (int64_t j = 0; j <= row; ++j) sum[j] += part[j];
        }
      }
    };
    torch::stable::parallel_for(0, samples * channels, grain_of(channels * parts), add);
    return sums.get();
  }
};

// Symmetric matrices [N, C, C] from their lower triangles: `fill(n, i, row)` writes row i up to column i.
// Without `out` the rows are dropped. A block of rows is mirrored in runs of a cache line.
template <typename T, typename Fill>
static void write_symmetric(int64_t samples, int64_t channels, T* out, const Fill& fill) {
  constexpr int64_t rows = 16;
  const int64_t blocks = (channels + rows - 1) / rows;
  auto write = [&](int64_t begin, int64_t end) {
    std::vector<T> dropped(out == nullptr ? static_cast<size_t>(channels) : 0);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / blocks;
      const int64_t first = balanced(unit % blocks, blocks) * rows;
      const int64_t last = std::min(first + rows, channels);
      T* matrix = out == nullptr ? nullptr : out + n * channels * channels;
      for (int64_t i = first; i < last; ++i) {
        fill(n, i, matrix == nullptr ? dropped.data() : matrix + i * channels);
      }
      for (int64_t j = 0; j < last && matrix != nullptr; ++j) {
        for (int64_t i = std::max(first, j + 1); i < last; ++i) {
          matrix[j * channels + i] = matrix[i * channels + j];
        }
      }
    }
  };
  torch::stable::parallel_for(0, samples * blocks, grain_of(rows * channels), write);
}

// Symmetric factors as the product kernel reads them, zero beyond C columns: `fill(n, i, row)` writes row i.
template <typename T, typename Fill>
static std::unique_ptr<T[]> padded_factor(int64_t samples, int64_t channels, const Fill& fill) {
  const int64_t cols = SymmetricProductCall::padded_cols(channels);
  std::unique_ptr<T[]> factor(new T[static_cast<size_t>(samples * channels * cols)]);
  torch::stable::parallel_for(0, samples * channels, grain_of(cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* row = factor.get() + i * cols;
      fill(i / channels, i % channels, row);
      std::fill(row + channels, row + cols, T(0));
    }
  });
  return factor;
}

// factor [N, C, cols] (padded) * features, in the features' layout and dtype.
template <typename T>
static Tensor symmetric_product(const Features& features, const T* factor) {
  Tensor out =
      empty_output(features.ready, features.size, features.channels_last, features.ready.scalar_type());
  SymmetricProductCall call;
  call.map = features.map;
  call.factor = factor;
  call.out = out.mutable_data_ptr();
  call.stream = out.numel() * static_cast<int64_t>(out.element_size()) > kStreamBytes;
  if (features.map.pixels == 0 || features.map.channels == 0) return out;
  const double channels = static_cast<double>(features.map.channels);
  const double rows = call.bands() == 1 ? channels : static_cast<double>(SymmetricProductCall::band);
  const double pixels = static_cast<double>(std::min(SymmetricProductCall::block, call.map.pixels));
  run_units(call, IK_PICK_ISA(gram_kernels, sizeof(T) == 8).symmetric_product, call.units(),
            grain_of_flops(2 * channels * rows * pixels));
  return out;
}

}  // namespace ik
