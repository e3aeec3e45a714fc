// hole_valid on CUDA: pixel loss of the hole and of the known (valid) region in one pass.
//
//   forward   v = mask or 1 - mask, h = 1 - v; hole = sum_n scale_n0 sum_i h_i penalty(pred_i - target_i),
//             valid likewise with v and scale_n1
//   backward  d / d pred_i = (g_hole scale_n0 h_i + g_valid scale_n1 v_i) penalty'(d_i), d / d target_i =
//   minus
//             that
//
// Saved for backward: scale and, for l1, the signs of d (2 bits an element); the other penalties need pred
// and target. Work split: pixel.cuh. Two launches forward, one backward. Bytes per element, fp32 images and
// mask [N, 1, H, W]: forward 8 + 4/C + 1/4 (signs); backward 1/4 (l1) or 8,
// + 4/C + 4 a gradient.
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
  const ForwardCall call{pred,
                         target,
                         &mask,
                         parse_penalty(penalty),
                         static_cast<float>(param),
                         parse_normalize(normalize),
                         mask_is_hole,
                         save_signs};
  ForwardResult r = run_forward<Mode::two_regions>(call);
  return {r.loss[0], r.loss[1], r.scale, r.signs};
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
  const BackwardCall call{{pointer(grad_hole), pointer(grad_valid)},
                          scale,
                          pointer(signs),
                          &mask,
                          pointer(pred),
                          pointer(target),
                          size,
                          channels_last,
                          pred_dtype,
                          target_dtype,
                          parse_penalty(penalty),
                          static_cast<float>(param),
                          mask_is_hole,
                          need_pred,
                          need_target};
  return run_backward<Mode::two_regions>(call);
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("hole_valid_cuda", TORCH_BOX(&ik::cuda::hole_valid));
  m.impl("hole_valid_backward_cuda", TORCH_BOX(&ik::cuda::hole_valid_backward));
}
