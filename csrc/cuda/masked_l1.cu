// masked_l1 on CUDA: masked L1, MSE, Charbonnier and Huber losses.
//
//   forward   S_n = sum_i w_i penalty(pred_i - target_i), M_n = sum_i w_i over sample n, w broadcast over C;
//             loss = sum_n scale_n S_n
//   backward  d loss / d pred_i = grad scale_n w_i penalty'(d_i), d loss / d target_i = minus that
//
// Saved for backward: scale and, for l1, the signs of d (2 bits an element, 0 where w_i = 0); the other
// penalties need pred and target. The kernels are those of pixel.cuh, with one layer, one prediction and one
// region. Two launches forward, one backward. The map of reduction "none" is left to Triton and the
// reference.
#include <torch/csrc/stable/library.h>

#include "cuda/pixel_launch.cuh"

namespace ik::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> masked_l1(const Tensor& pred,                 // [N, C, H, W]
                                             const Tensor& target,               // [N, C, H, W]
                                             const std::optional<Tensor>& mask,  // [H, W] or [N|1, C|1, H, W]
                                             const std::string& penalty, double param,
                                             const std::string& reduction, const std::string& normalize,
                                             bool save_signs) {
  const bool mean = reduction == "mean";
  STD_TORCH_CHECK(mean || reduction == "sum", "reduction: the cuda backend takes mean and sum, got '",
                  reduction, "'");
  const LayerTensors layer = image_layer(pred, target, pointer(mask));
  Tensor scale = empty_strided(pred, {layer.batch, 1}, {1, 1}, ScalarType::Float);
  const PixelResult result =
      run_forward<1>({parse_penalty(penalty), static_cast<float>(param)}, {layer}, {1.0},
                     mean ? parse_normalize(normalize) : Normalize::sum, save_signs, scale);
  return {result.loss[0], scale, result.signs[0]};
}

std::tuple<Tensor, Tensor> masked_l1_backward(
    const Tensor& grad,                   // []
    const Tensor& scale,                  // [N, 1]
    const std::optional<Tensor>& signs,   // [bytes]
    const std::optional<Tensor>& mask,    // [H, W] or [N|1, C|1, H, W]
    const std::optional<Tensor>& pred,    // [N, C, H, W]
    const std::optional<Tensor>& target,  // [N, C, H, W]
    const std::vector<int64_t>& size, bool channels_last, ScalarType pred_dtype, ScalarType target_dtype,
    const std::string& penalty, double param, bool need_pred, bool need_target) {
  return image_gradients<1>(
      {parse_penalty(penalty), static_cast<float>(param)},
      {size, size.at(0), channels_last, pointer(mask), pointer(pred), pointer(target), pointer(signs)},
      {&grad}, scale, pred_dtype, target_dtype, need_pred, need_target);
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("masked_l1_cuda", TORCH_BOX(&ik::cuda::masked_l1));
  m.impl("masked_l1_backward_cuda", TORCH_BOX(&ik::cuda::masked_l1_backward));
}
