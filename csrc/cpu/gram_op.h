// From torch tensors to the Gram kernels: what the registrations of gram and style share.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "common/gram.h"
#include "common/op_args.h"
#include "cpu/convert.h"
#include "cpu/gram_kernels.h"
#include "cpu/output.h"
#include "cpu/scalar.h"
#include "cpu/torch_dtype.h"

namespace ik {

static inline const GramKernels& gram_kernels_for(bool wide) {
  return wide ? generic::gram_kernels_wide : IK_PICK_ISA(gram_kernels);
}

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

// Runs `kernel` over the units of `call`, each of about `flops` floating-point operations.
template <typename Call, typename Kernel>
static void run_gram_units(const Call& call, Kernel kernel, double flops) {
  const int64_t units = call.units();
  const int64_t grain = static_cast<int64_t>(1e6 / std::max(flops, 1.0)) + 1;
  if (units <= grain) return kernel(call, 0, units);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
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
    run_gram_units(call, gram_kernels_for(sizeof(T) == 8).gram,
                   rows * static_cast<double>(channels * std::min(call.part_pixels(), map.pixels)));
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
      T* matrix = out + n * channels * channels;
      for (int64_t i = first; i < last; ++i)
        fill(n, i, out == nullptr ? dropped.data() : matrix + i * channels);
      for (int64_t j = 0; j < last && out != nullptr; ++j) {
        for (int64_t i = std::max(first, j + 1); i < last; ++i)
          matrix[j * channels + i] = matrix[i * channels + j];
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
  run_gram_units(call, gram_kernels_for(sizeof(T) == 8).symmetric_product,
                 2 * channels * static_cast<double>(std::min(SymmetricProductCall::block, call.map.pixels)) *
                     (call.bands() == 1 ? channels : static_cast<double>(SymmetricProductCall::band)));
  return out;
}

}  // namespace ik
