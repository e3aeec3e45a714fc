// CPU registration of total_variation. The kernels are in pairs.cpp.
#include "cpu/isa.h"

#if defined(IK_ISA_GENERIC)

#include "cpu/pairs_op.h"

namespace ik {
namespace {

std::tuple<Tensor, Tensor, Tensor> total_variation(const Tensor& image,                  // [N, C, H, W]
                                                   const std::optional<Tensor>& target,  // [N, C, H, W]
                                                   const std::optional<Tensor>& mask,    // broadcasts
                                                   const std::string& region, const std::string& penalty,
                                                   const std::string& normalize, bool mask_is_hole,
                                                   bool save_signs) {
  PairTensors t(std::vector<int64_t>(image.sizes().begin(), image.sizes().end()),
                !image.is_contiguous() && is_channels_last(image), image.scalar_type(),
                target.has_value() ? target->scalar_type() : image.scalar_type(), region, penalty,
                mask_is_hole);
  const PairNormalize denominators = parse_pair_normalize(normalize);
  t.call.composite = target.has_value();
  t.call.sum_region = denominators == PairNormalize::mask;
  t.set_images(image, target);
  if (mask.has_value()) t.set_mask(*mask);
  Tensor signs = t.make_signs(image, mask, save_signs);
  Tensor loss = empty_scalar(image, t.dtype);
  Tensor scale = empty_1d(image, 2, t.dtype);
  double value = 0;
  finish_total_variation(t, denominators, sample_sums(t.call), value, scale);
  write_scalar(value, t.call.wide, loss);
  return {loss, scale, signs};
}

std::tuple<Tensor, Tensor> total_variation_backward(
    const Tensor& grad,   // []
    const Tensor& scale,  // [2]
    const std::optional<Tensor>& signs, const std::optional<Tensor>& mask, const std::optional<Tensor>& image,
    const std::optional<Tensor>& target, const std::vector<int64_t>& size, bool channels_last,
    ScalarType image_dtype, ScalarType target_dtype, bool composite, const std::string& region,
    const std::string& penalty, bool mask_is_hole, bool need_image, bool need_target) {
  PairTensors t(size, channels_last, image_dtype, target_dtype, region, penalty, mask_is_hole);
  t.call.composite = composite;
  if (mask.has_value()) t.set_mask(*mask);
  if (t.call.penalty == Penalty::l1) {
    STD_TORCH_CHECK(signs.has_value(), "the backward lacks what the forward saves for this penalty");
    t.set_signs(*signs, mask);
  } else {
    STD_TORCH_CHECK(image.has_value(), "the backward lacks what the forward saves for this penalty");
    t.set_images(*image, target);
  }
  const double upstream = scalar_value(grad);
  const std::vector<double> c = values_of(scale);
  const PairCoefficients same{0, 0, upstream * c[0], upstream * c[1]};
  return pair_gradients(t, scale, image_dtype, target_dtype, need_image, need_target,
                        std::vector<PairCoefficients>(static_cast<size_t>(size[0]), same));
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("total_variation_cpu", TORCH_BOX(&ik::total_variation));
  m.impl("total_variation_backward_cpu", TORCH_BOX(&ik::total_variation_backward));
}

#endif
