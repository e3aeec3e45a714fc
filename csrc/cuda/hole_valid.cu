// hole_valid on CUDA: pixel loss of the hole and of the known (valid) region in one pass.
//
//   forward   v = mask or 1 - mask, h = 1 - v; hole = sum_n scale_n0 sum_i h_i penalty(pred_i - target_i),
//             valid likewise with v and scale_n1
//   backward  d / d pred_i = (g_hole scale_n0 h_i + g_valid scale_n1 v_i) penalty'(d_i),
//             d / d target_i = minus that
//
// Saved for backward: scale and, for l1, the signs of d (2 bits an element); the other penalties need pred
// and target. The kernels are those of pixel.cuh, with one layer, one prediction and two regions. Two
// launches forward, one backward.
#include <torch/csrc/stable/library.h>

#include "cuda/pixel_launch.cuh"

namespace ik::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> hole_valid(const Tensor& pred,    // [N, C, H, W]
                                                      const Tensor& target,  // [N, C, H, W]
                                                      const Tensor& mask,    // [H, W] or [N|1, C|1, H, W]
                                                      const std::string& penalty, double param,
                                                      const std::string& normalize, bool mask_is_hole,
                                                      bool save_signs) {
  const LayerTensors layer = image_layer(pred, target, &mask);
  Tensor scale = empty_strided(pred, {layer.batch, 2}, {2, 1}, ScalarType::Float);
  const PixelResult result = run_forward<2>({parse_penalty(penalty), static_cast<float>(param), mask_is_hole},
                                            {layer}, {1.0}, parse_normalize(normalize), save_signs, scale);
  return {result.loss[0], result.loss[1], scale, result.signs[0]};
}

std::tuple<Tensor, Tensor> hole_valid_backward(const std::optional<Tensor>& grad_hole,   // []
                                               const std::optional<Tensor>& grad_valid,  // []
                                               const Tensor& scale,                 // [N, 2] (hole, valid)
                                               const std::optional<Tensor>& signs,  // [bytes]
                                               const Tensor& mask,  // [H, W] or [N|1, C|1, H, W]
                                               const std::optional<Tensor>& pred,    // [N, C, H, W]
                                               const std::optional<Tensor>& target,  // [N, C, H, W]
                                               const std::vector<int64_t>& size, bool channels_last,
                                               ScalarType pred_dtype, ScalarType target_dtype,
                                               const std::string& penalty, double param, bool mask_is_hole,
                                               bool need_pred, bool need_target) {
  return image_gradients<2>(
      {parse_penalty(penalty), static_cast<float>(param), mask_is_hole},
      {size, size.at(0), channels_last, &mask, pointer(pred), pointer(target), pointer(signs)},
      {pointer(grad_hole), pointer(grad_valid)}, scale, pred_dtype, target_dtype, need_pred, need_target);
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("hole_valid_cuda", TORCH_BOX(&ik::cuda::hole_valid));
  m.impl("hole_valid_backward_cuda", TORCH_BOX(&ik::cuda::hole_valid_backward));
}
