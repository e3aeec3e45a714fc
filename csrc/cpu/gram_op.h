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

// Lower triangles of X X^T, unscaled: [N, C, C] in double, row i up to column i.
template <typename T>
static std::unique_ptr<double[]> gram_sums(const FeatureMap& map) {
  GramCall call;
  call.map = map;
  const int64_t entries = map.channels * map.channels;
  const int64_t parts = call.parts();
  std::unique_ptr<T[]> partials(new T[static_cast<size_t>(map.samples * parts * entries)]);
  call.partials = partials.get();
  const double rows = static_cast<double>(std::min(GramCall::band, map.channels));
  run_gram_units(call, gram_kernels_for(sizeof(T) == 8).gram,
                 rows * static_cast<double>(map.channels * std::min(call.part_pixels(), map.pixels)));
  std::unique_ptr<double[]> sums(new double[static_cast<size_t>(map.samples * entries)]);
  torch::stable::parallel_for(0, map.samples, grain_of(entries * parts), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * map.channels; i < end * map.channels; ++i) {
      const int64_t row = i % map.channels;
      const T* part = partials.get() + (i / map.channels * parts * map.channels + row) * map.channels;
      double* sum = sums.get() + i * map.channels;
      for (int64_t j = 0; j <= row; ++j) sum[j] = 0;
      for (int64_t p = 0; p < parts; ++p, part += entries) {
        for (int64_t j = 0; j <= row; ++j) sum[j] += part[j];
      }
    }
  });
  return sums;
}

// Zero-padded copy of symmetric factors, as the product kernel reads them: entry(n, i, j) for i, j < C.
template <typename T, typename Entry>
static std::unique_ptr<T[]> padded_factor(int64_t samples, int64_t channels, const Entry& entry) {
  const int64_t cols = SymmetricProductCall::padded_cols(channels);
  std::unique_ptr<T[]> factor(new T[static_cast<size_t>(samples * channels * cols)]());
  torch::stable::parallel_for(0, samples * channels, grain_of(cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* row = factor.get() + i * cols;
      for (int64_t j = 0; j < channels; ++j) row[j] = entry(i / channels, i % channels, j);
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
                 2 * channels * channels * static_cast<double>(SymmetricProductCall::block));
  return out;
}

}  // namespace ik
