// Host side of gram and style on CUDA: what gram_kernels.cu offers to their registrations.
#pragma once

#include <optional>
#include <vector>

#include "cuda/arguments.cuh"

namespace ik::cuda {

// A feature tensor in the layout of its memory; a tensor that is neither NCHW nor channels_last is copied to
// NCHW.
struct Features {
  Tensor ready;
  std::vector<int64_t> size;
  bool channels_last;

  explicit Features(const Tensor& tensor);
  int64_t samples() const { return size[0]; }
  int64_t channels() const { return size[1]; }
  int64_t pixels() const { return size[2] * size[3]; }
  ScalarType dtype() const { return ready.scalar_type(); }
};

// [N, C, C] = scale X X^T
Tensor gram_matrices(const Features& features, double scale, const DeviceScope& device);

struct StyleLayer {
  Features input;
  std::optional<Features> target;
  std::optional<Tensor> gram;  // [N, C, C], if there is no target
  double input_scale;
  double target_scale;
  double weight;  // of the summed penalties
};

// The loss; `factors` [k N, C, C] of every layer are written where they are given.
Tensor style_loss(const std::vector<StyleLayer>& layers, bool l1, std::vector<Tensor>* factors,
                  const DeviceScope& device);

struct Product {
  Features features;  // [N, C, H, W]
  Tensor source;      // [k N, C, C], float32
  bool add_transposed;
  float multiplier;
  const Tensor* grad;  // scalar, or null
};

// multiplier * grad * F_n X_n of every layer, F_n the sum of source over the k predictions of sample n (plus
// its transpose).
std::vector<Tensor> symmetric_products(const std::vector<Product>& products, const DeviceScope& device);

}  // namespace ik::cuda
