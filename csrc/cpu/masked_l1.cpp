// CPU registration of masked_l1: masked L1, MSE, Charbonnier and Huber. The kernels are in pixel.cpp.
#include "cpu/isa.h"

#if defined(IK_ISA_GENERIC)

#include "cpu/pixel_op.h"

namespace ik {
namespace {

std::tuple<Tensor, Tensor, Tensor> masked_l1(const Tensor& pred,                 // [N, C, H, W]
                                             const Tensor& target,               // [N, C, H, W]
                                             const std::optional<Tensor>& mask,  // broadcasts to [N, C, H, W]
                                             const std::string& penalty, double param,
                                             const std::string& reduction, const std::string& normalize,
                                             bool save_signs) {
  PixelTensors t = forward_tensors(pred, target, mask, penalty, param);
  Tensor signs = make_signs(t, pred, save_signs, mask);
  if (reduction == "none") {
    Tensor out = empty_output(pred, t.size, t.channels_last, t.dtype);
    t.call.map = out.mutable_data_ptr();
    if (t.call.shape.numel() > 0) run_units(t.call, kernels_for(t.call).forward);
    return {out, empty_1d(pred, 0, t.dtype), signs};
  }
  Tensor out = empty_scalar(pred, t.dtype);
  Tensor scale = empty_strided(pred, {t.size[0], 1}, {1, 1}, t.dtype);
  reduce(t, reduction == "sum" ? Normalize::sum : parse_normalize(normalize), &out, scale);
  return {out, scale, signs};
}

std::tuple<Tensor, Tensor> masked_l1_backward(
    const Tensor& grad,   // [] or [N, C, H, W]
    const Tensor& scale,  // [N, 1]
    const std::optional<Tensor>& signs, const std::optional<Tensor>& mask, const std::optional<Tensor>& pred,
    const std::optional<Tensor>& target, const std::vector<int64_t>& size, bool channels_last,
    ScalarType pred_dtype, ScalarType target_dtype, const std::string& penalty, double param, bool need_pred,
    bool need_target) {
  PixelTensors t =
      backward_tensors(pred, target, signs, size, channels_last, pred_dtype, target_dtype, penalty, param);
  set_backward_mask(t, mask);
  std::vector<double> coefficient;
  if (grad.dim() == 0) {
    coefficient = coefficients(scale, {grad});
    t.call.coefficient = coefficient.data();
  } else {
    t.call.grad_map = t.add(grad, true);
  }
  return differentiate(t, grad, pred_dtype, target_dtype, need_pred, need_target, t.call.shape.numel());
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("masked_l1_cpu", TORCH_BOX(&ik::masked_l1));
  m.impl("masked_l1_backward_cpu", TORCH_BOX(&ik::masked_l1_backward));
}

#endif
