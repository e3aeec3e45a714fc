// masked_l1: masked L1, MSE, Charbonnier and Huber. The kernels are in isa/pixel.cpp.
#include "cpu/pixel_op.h"

namespace ik {
namespace {

std::tuple<Tensor, Tensor, Tensor> masked_l1(const Tensor& pred,                 // [N, C, H, W]
                                             const Tensor& target,               // [N, C, H, W]
                                             const std::optional<Tensor>& mask,  // broadcasts to [N, C, H, W]
                                             const std::string& penalty, double param,
                                             const std::string& reduction, const std::string& normalize,
                                             bool save_signs) {
  PixelTensors t(ImageKind::of(pred, target), penalty, param);
  t.set_forward(pred, target, mask);
  Tensor signs = t.make_signs(pred, save_signs, mask);
  if (reduction == "none") {
    Tensor out = empty_output(pred, t.kind.size, t.kind.channels_last, t.dtype);
    t.call.map = out.mutable_data_ptr();
    t.run(t.kernels().forward);
    return {out, empty_1d(pred, 0, t.dtype), signs};
  }
  const auto [losses, scale] = t.reduce(reduction == "sum" ? Normalize::sum : parse_normalize(normalize));
  return {make_scalar(pred, losses[0], t.dtype), make_tensor(pred, scale, {t.kind.size[0], 1}, t.dtype),
          signs};
}

std::tuple<Tensor, Tensor> masked_l1_backward(
    const Tensor& grad,   // [] or [N, C, H, W]
    const Tensor& scale,  // [N, 1]
    const std::optional<Tensor>& signs, const std::optional<Tensor>& mask, const std::optional<Tensor>& pred,
    const std::optional<Tensor>& target, const std::vector<int64_t>& size, bool channels_last,
    ScalarType pred_dtype, ScalarType target_dtype, const std::string& penalty, double param, bool need_pred,
    bool need_target) {
  PixelTensors t({size, channels_last, pred_dtype, target_dtype}, penalty, param);
  t.set_saved(pred, target, signs);
  t.set_backward_mask(mask);
  std::vector<double> coefficient;
  if (grad.dim() == 0) {
    coefficient = coefficients(scale, {grad});
    t.call.coefficient = coefficient.data();
  } else {
    t.call.grad_map = t.add(grad);
  }
  return t.gradients(grad, need_pred, need_target, t.call.shape.numel());
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("masked_l1_cpu", TORCH_BOX(&ik::masked_l1));
  m.impl("masked_l1_backward_cpu", TORCH_BOX(&ik::masked_l1_backward));
}
