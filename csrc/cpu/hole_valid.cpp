// CPU registration of hole_valid. The kernels are in pixel.cpp.
#include "cpu/isa.h"

#if defined(IK_ISA_GENERIC)

#include "cpu/pixel_op.h"

namespace ik {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> hole_valid(const Tensor& pred,    // [N, C, H, W]
                                                      const Tensor& target,  // [N, C, H, W]
                                                      const Tensor& mask,    // broadcasts to [N, C, H, W]
                                                      const std::string& penalty, double param,
                                                      const std::string& normalize, bool mask_is_hole,
                                                      bool save_signs) {
  PixelTensors t = forward_tensors(pred, target, mask, penalty, param);
  t.call.regions = 2;
  t.call.mask_is_hole = mask_is_hole;
  Tensor signs = make_signs(t, pred, save_signs, mask);
  Tensor losses[2] = {empty_scalar(pred, t.dtype), empty_scalar(pred, t.dtype)};
  Tensor scale = empty_strided(pred, {t.size[0], 2}, {2, 1}, t.dtype);
  reduce(t, parse_normalize(normalize), losses, scale);
  return {losses[0], losses[1], scale, signs};
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
  PixelTensors t =
      backward_tensors(pred, target, signs, size, channels_last, pred_dtype, target_dtype, penalty, param);
  t.call.regions = 2;
  set_backward_mask(t, mask);
  t.call.mask_is_hole = mask_is_hole;
  const std::vector<double> coefficient = coefficients(scale, {grad_hole, grad_valid});
  t.call.coefficient = coefficient.data();
  return differentiate(t, scale, pred_dtype, target_dtype, need_pred, need_target, t.call.shape.numel());
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("hole_valid_cpu", TORCH_BOX(&ik::hole_valid));
  m.impl("hole_valid_backward_cpu", TORCH_BOX(&ik::hole_valid_backward));
}

#endif
