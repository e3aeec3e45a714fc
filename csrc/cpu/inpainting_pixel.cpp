// inpainting_pixel. The kernels are in isa/pairs.cpp.
#include "cpu/pairs_op.h"

namespace ik {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inpainting_pixel(
    const Tensor& pred,    // [N, C, H, W]
    const Tensor& target,  // [N, C, H, W]
    const Tensor& mask,    // broadcasts to [N, C, H, W]
    double hole_weight, double valid_weight, double tv_weight, const std::string& normalize,
    const std::string& tv_region, const std::string& tv_normalize, bool mask_is_hole, bool save_signs) {
  PairTensors t(ImageKind::of(pred, target), tv_region, "l1", mask_is_hole);
  const PairNormalize denominators = parse_pair_normalize(tv_normalize);
  const Normalize regions = parse_normalize(normalize);
  t.call.composite = t.call.losses = true;
  t.call.sum_region = denominators == PairNormalize::mask;
  t.set_images(pred, target);
  t.set_mask(mask);
  Tensor signs = t.make_signs(pred, mask, save_signs);
  const std::vector<PairSums> sums = t.sample_sums();
  PairSums sum;
  for (const PairSums& sample : sums) sum += sample;
  const std::vector<double> tv_scale = t.tv_scales(denominators, sum);
  const double tv = tv_scale[0] * sum.down + tv_scale[1] * sum.across;
  const double numel = static_cast<double>(t.call.shape.numel());
  const double samples = static_cast<double>(sums.size());
  std::vector<double> scale;
  double hole = 0;
  double valid = 0;
  for (const PairSums& sample : sums) {
    scale.push_back(sample_scale(regions, sample.hole_weight, sum.hole_weight, numel, samples));
    hole += scale.back() * sample.hole;
    scale.push_back(sample_scale(regions, sample.valid_weight, sum.valid_weight, numel, samples));
    valid += scale.back() * sample.valid;
  }
  return {make_scalar(pred, hole_weight * hole + valid_weight * valid + tv_weight * tv, t.dtype),
          make_scalar(pred, hole, t.dtype),
          make_scalar(pred, valid, t.dtype),
          make_scalar(pred, tv, t.dtype),
          make_tensor(pred, scale, {t.kind.size[0], 2}, t.dtype),
          make_tensor(pred, tv_scale, {2}, t.dtype),
          signs};
}

std::tuple<Tensor, Tensor> inpainting_pixel_backward(
    const std::optional<Tensor>& grad_total, const std::optional<Tensor>& grad_hole,
    const std::optional<Tensor>& grad_valid, const std::optional<Tensor>& grad_tv,
    const Tensor& scale,     // [N, 2]
    const Tensor& tv_scale,  // [2]
    const Tensor& signs, const Tensor& mask, const std::vector<int64_t>& size, bool channels_last,
    ScalarType pred_dtype, ScalarType target_dtype, double hole_weight, double valid_weight, double tv_weight,
    const std::string& tv_region, bool mask_is_hole, bool need_pred, bool need_target) {
  PairTensors t({size, channels_last, pred_dtype, target_dtype}, tv_region, "l1", mask_is_hole);
  t.call.composite = t.call.losses = true;
  t.set_mask(mask);
  t.set_signs(signs, mask);
  const double total = scalar_value(grad_total);
  const double hole = scalar_value(grad_hole) + hole_weight * total;
  const double valid = scalar_value(grad_valid) + valid_weight * total;
  const double tv = scalar_value(grad_tv) + tv_weight * total;
  const std::vector<double> pixel = values_of(scale);
  const std::vector<double> pair = values_of(tv_scale);
  std::vector<PairCoefficients> coefficients;
  for (size_t n = 0; n < pixel.size(); n += 2) {
    coefficients.push_back({hole * pixel[n], valid * pixel[n + 1], tv * pair[0], tv * pair[1]});
  }
  return t.gradients(scale, need_pred, need_target, coefficients);
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("inpainting_pixel_cpu", TORCH_BOX(&ik::inpainting_pixel));
  m.impl("inpainting_pixel_backward_cpu", TORCH_BOX(&ik::inpainting_pixel_backward));
}
