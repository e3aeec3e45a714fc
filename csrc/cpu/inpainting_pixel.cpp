// CPU registration of inpainting_pixel. The kernels are in pairs.cpp.
#include "cpu/isa.h"

#if defined(IK_ISA_GENERIC)

#include "cpu/pairs_op.h"

namespace ik {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inpainting_pixel(
    const Tensor& pred,    // [N, C, H, W]
    const Tensor& target,  // [N, C, H, W]
    const Tensor& mask,    // broadcasts to [N, C, H, W]
    double hole_weight, double valid_weight, double tv_weight, const std::string& normalize,
    const std::string& tv_region, const std::string& tv_normalize, bool mask_is_hole, bool save_signs) {
  PairTensors t(std::vector<int64_t>(pred.sizes().begin(), pred.sizes().end()),
                !pred.is_contiguous() && is_channels_last(pred), pred.scalar_type(), target.scalar_type(),
                tv_region, "l1", mask_is_hole);
  PairCall& call = t.call;
  const PairNormalize denominators = parse_pair_normalize(tv_normalize);
  const Normalize regions = parse_normalize(normalize);
  call.composite = call.losses = true;
  call.sum_region = denominators == PairNormalize::mask;
  t.set_images(pred, target);
  t.set_mask(mask);
  Tensor signs = t.make_signs(pred, mask, save_signs);
  Tensor tv_scale = empty_1d(pred, 2, t.dtype);
  Tensor scale = empty_strided(pred, {t.size[0], 2}, {2, 1}, t.dtype);
  const std::vector<PairSums> sums = sample_sums(call);
  double tv = 0;
  finish_total_variation(t, denominators, sums, tv, tv_scale);
  double hole_weights = 0;
  double valid_weights = 0;
  for (const PairSums& sample : sums) {
    hole_weights += sample.hole_weight;
    valid_weights += sample.valid_weight;
  }
  const double numel = static_cast<double>(call.shape.numel());
  const double samples = static_cast<double>(sums.size());
  std::vector<double> scales;
  double hole = 0;
  double valid = 0;
  for (const PairSums& sample : sums) {
    scales.push_back(sample_scale(regions, sample.hole_weight, hole_weights, numel, samples));
    hole += scales.back() * sample.hole;
    scales.push_back(sample_scale(regions, sample.valid_weight, valid_weights, numel, samples));
    valid += scales.back() * sample.valid;
  }
  call.wide ? write_scale<double>(scales, scale) : write_scale<float>(scales, scale);
  const auto scalar = [&](double value) {
    Tensor out = empty_scalar(pred, t.dtype);
    write_scalar(value, call.wide, out);
    return out;
  };
  return {scalar(hole_weight * hole + valid_weight * valid + tv_weight * tv),
          scalar(hole),
          scalar(valid),
          scalar(tv),
          scale,
          tv_scale,
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
  PairTensors t(size, channels_last, pred_dtype, target_dtype, tv_region, "l1", mask_is_hole);
  t.call.composite = t.call.losses = true;
  t.set_mask(mask);
  t.set_signs(signs, mask);
  const double total = grad_total.has_value() ? scalar_value(*grad_total) : 0.0;
  const auto upstream = [&](const std::optional<Tensor>& grad, double weight) {
    return (grad.has_value() ? scalar_value(*grad) : 0.0) + weight * total;
  };
  const double hole = upstream(grad_hole, hole_weight);
  const double valid = upstream(grad_valid, valid_weight);
  const double tv = upstream(grad_tv, tv_weight);
  const std::vector<double> pixel = values_of(scale);
  const std::vector<double> pair = values_of(tv_scale);
  std::vector<PairCoefficients> found;
  for (size_t n = 0; n < pixel.size(); n += 2) {
    found.push_back({hole * pixel[n], valid * pixel[n + 1], tv * pair[0], tv * pair[1]});
  }
  return pair_gradients(t, scale, pred_dtype, target_dtype, need_pred, need_target, found);
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("inpainting_pixel_cpu", TORCH_BOX(&ik::inpainting_pixel));
  m.impl("inpainting_pixel_backward_cpu", TORCH_BOX(&ik::inpainting_pixel_backward));
}

#endif
