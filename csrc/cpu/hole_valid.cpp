// hole_valid. The kernels are in isa/pixel.cpp.
#include "cpu/pixel_op.h"

namespace ik {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> hole_valid(const Tensor& pred,    // [N, C, H, W]
                                                      const Tensor& target,  // [N, C, H, W]
                                                      const Tensor& mask,    // broadcasts to [N, C, H, W]
                                                      const std::string& penalty, double param,
                                                      const std::string& normalize, bool mask_is_hole,
                                                      bool save_signs) {
  PixelTensors t(ImageKind::of(pred, target), penalty, param, 2);
  t.set_forward(pred, target, mask);
  t.call.mask_is_hole = mask_is_hole;
  Tensor signs = t.make_signs(pred, save_signs, mask);
  const auto [losses, scale] = t.reduce(parse_normalize(normalize));
  return {make_scalar(pred, losses[0], t.dtype), make_scalar(pred, losses[1], t.dtype),
          make_tensor(pred, scale, {t.kind.size[0], 2}, t.dtype), signs};
}

std::tuple<Tensor, Tensor> hole_valid_backward(const std::optional<Tensor>& grad_hole,   // []
                                               const std::optional<Tensor>& grad_valid,  // []
                                               const Tensor& scale,                      // [N, 2]
                                               const std::optional<Tensor>& signs, const Tensor& mask,
                                               const std::optional<Tensor>& pred,
                                               const std::optional<Tensor>& target,
                                               const std::vector<int64_t>& size, bool channels_last,
                                               ScalarType pred_dtype, ScalarType target_dtype,
                                               const std::string& penalty, double param, bool mask_is_hole,
                                               bool need_pred, bool need_target) {
  PixelTensors t({size, channels_last, pred_dtype, target_dtype}, penalty, param, 2);
  t.set_saved(pred, target, signs);
  t.set_backward_mask(mask);
  t.call.mask_is_hole = mask_is_hole;
  const std::vector<double> coefficient = coefficients(scale, {grad_hole, grad_valid});
  t.call.coefficient = coefficient.data();
  return t.gradients(scale, need_pred, need_target, t.call.shape.numel());
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("hole_valid_cpu", TORCH_BOX(&ik::hole_valid));
  m.impl("hole_valid_backward_cpu", TORCH_BOX(&ik::hole_valid_backward));
}
