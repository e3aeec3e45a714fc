// What the pixel losses on CUDA call: the kernels of pixel.cuh on tensors. Implemented in pixel.cu.
#pragma once

#include "cuda/arguments.cuh"

namespace ik::cuda {

// The tensors of one layer: what a forward reads, or what a backward reads and writes.
struct LayerTensors {
  std::vector<int64_t> size;  // k N, C, H, W
  int64_t batch;              // N
  bool channels_last;
  const Tensor* mask;             // [H, W] or [1|N|k N, 1|C, H, W] or null
  const Tensor* input;            // [k N, C, H, W]; null in the backward of l1
  const Tensor* target;           // [N, C, H, W]; likewise
  const Tensor* signs;            // [bytes], l1; written by the forward; null where none are kept
  Tensor* grad_input = nullptr;   // [k N, C, H, W] or null
  Tensor* grad_target = nullptr;  // [N, C, H, W] or null, only with one prediction
};

// What a call is, apart from its tensors.
struct PixelCall {
  Penalty penalty;
  float param;
  bool mask_is_hole = false;  // of two regions
  bool per_sample = true;     // a row of the scales belongs to a sample, not to a layer
};

struct PixelResult {
  std::vector<Tensor> loss;   // [] of each region
  std::vector<Tensor> signs;  // [bytes] of each layer, empty if none are kept
};

LayerTensors image_layer(const Tensor& input, const Tensor& target, const Tensor* mask);

// A streaming kernel for each pair of dtypes, then a small one that adds the partial sums. `scale` [rows, R]
// is written; `weights` of the layers.
template <int R>
PixelResult run_forward(const PixelCall& call, std::vector<LayerTensors> tensors,
                        const std::vector<double>& weights, Normalize normalize, bool save_signs,
                        Tensor& scale);

// Fills the gradients of all layers. `grad`: scalars, one per region, or null.
template <int R>
void run_backward(const PixelCall& call, const std::vector<LayerTensors>& tensors,
                  const std::array<const Tensor*, R>& grad, const Tensor& scale);

// Of an op on one pair of images, `pred` and `target`: both gradients, empty ones where they are not needed.
template <int R>
std::tuple<Tensor, Tensor> image_gradients(const PixelCall& call, LayerTensors tensors,
                                           const std::array<const Tensor*, R>& grad, const Tensor& scale,
                                           ScalarType pred_dtype, ScalarType target_dtype, bool need_pred,
                                           bool need_target);

}  // namespace ik::cuda
