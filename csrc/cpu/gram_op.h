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
  const double pixels = static_cast<double>(map.channels * std::min(call.part_pixels(), map.pixels));
  run_units(call, IK_PICK_ISA(gram_kernels, sizeof(T) == 8).gram, call.units(),
            grain_of_flops(rows * pixels));
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
  run_units(call, IK_PICK_ISA(gram_kernels, sizeof(T) == 8).symmetric_product, call.units(),
            grain_of_flops(2 * channels * channels * static_cast<double>(SymmetricProductCall::block)));
  return out;
}

}  // namespace ik
