// total_variation. The kernels are in isa/pairs.cpp.
#include "cpu/pairs_op.h"

namespace ik {
namespace {

std::tuple<Tensor, Tensor, Tensor> total_variation(const Tensor& image,                  // [N, C, H, W]
                                                   const std::optional<Tensor>& target,  // [N, C, H, W]
                                                   const std::optional<Tensor>& mask,    // broadcasts
                                                   const std::string& region, const std::string& penalty,
                                                   const std::string& normalize, bool mask_is_hole,
                                                   bool save_signs) {
  PairTensors t(ImageKind::of(image, target.has_value() ? *target : image), region, penalty, mask_is_hole);
  const PairNormalize denominators = parse_pair_normalize(normalize);
  t.call.composite = target.has_value();
  t.call.sum_region = denominators == PairNormalize::mask;
  t.set_images(image, target);
  t.set_mask(mask);
  Tensor signs = t.make_signs(image, mask, save_signs);
  PairSums sum;
  for (const PairSums& sample : t.sample_sums()) sum += sample;
  const std::vector<double> scale = t.tv_scales(denominators, sum);
  return {make_scalar(image, scale[0] * sum.down + scale[1] * sum.across, t.dtype),
          make_tensor(image, scale, {2}, t.dtype), signs};
}

std::tuple<Tensor, Tensor> total_variation_backward(
    const Tensor& grad,   // []
    const Tensor& scale,  // [2]
    const std::optional<Tensor>& signs, const std::optional<Tensor>& mask, const std::optional<Tensor>& image,
    const std::optional<Tensor>& target, const std::vector<int64_t>& size, bool channels_last,
    ScalarType image_dtype, ScalarType target_dtype, bool composite, const std::string& region,
    const std::string& penalty, bool mask_is_hole, bool need_image, bool need_target) {
  PairTensors t({size, channels_last, image_dtype, target_dtype}, region, penalty, mask_is_hole);
  t.call.composite = composite;
  t.set_mask(mask);
  const bool l1 = t.call.penalty == Penalty::l1;
  STD_TORCH_CHECK((l1 ? signs : image).has_value(),
                  "the backward lacks what the forward saves for this penalty");
  if (l1) {
    t.set_signs(*signs, mask);
  } else {
    t.set_images(image, target);
  }
  const double upstream = scalar_value(grad);
  const std::vector<double> c = values_of(scale);
  const PairCoefficients same{0, 0, upstream * c[0], upstream * c[1]};
  return t.gradients(scale, need_image, need_target,
                     std::vector<PairCoefficients>(static_cast<size_t>(size[0]), same));
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("total_variation_cpu", TORCH_BOX(&ik::total_variation));
  m.impl("total_variation_backward_cpu", TORCH_BOX(&ik::total_variation_backward));
}
