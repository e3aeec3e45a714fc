// feature_distance, layer by layer on the kernels of isa/pixel.cpp.
#include "cpu/pixel_op.h"

namespace ik {
namespace {

// `batch`: samples of the target. The mask's batch is 1, that of the target or that of the input.
void set_layer(PixelTensors& t, const std::vector<Tensor>& masks, size_t layer, int64_t batch) {
  std::vector<int64_t> size = t.kind.size;
  if (batch > 0) t.call.predictions = size[0] / batch;
  if (masks.empty()) return;
  const Tensor& mask = masks[layer];
  t.call.mask_per_prediction = mask.dim() == 4 && mask.sizes()[0] == size[0] && size[0] != batch;
  if (!t.call.mask_per_prediction) size[0] = batch;
  t.set_mask(mask, size);
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> feature_distance(
    const std::vector<Tensor>& input,   // [k N, C, H, W] each
    const std::vector<Tensor>& target,  // [N, C, H, W] each
    const std::vector<Tensor>& mask,    // none, or one broadcasting to [N or k N, C, H, W] each
    const std::vector<double>& weights, const std::string& penalty, double param,
    const std::string& normalize, bool save_signs) {
  const size_t layers = input.size();
  STD_TORCH_CHECK(layers > 0 && target.size() == layers && weights.size() == layers &&
                      (mask.empty() || mask.size() == layers),
                  "feature_distance: input, target, mask and weights must have one entry for each layer");
  const Normalize norm = parse_normalize(normalize);
  const ScalarType dtype = accumulate_type(input, target);
  std::vector<Tensor> signs;
  std::vector<double> scales(layers);
  double loss = 0;
  for (size_t i = 0; i < layers; ++i) {
    PixelTensors t(ImageKind::of(input[i], target[i]), penalty, param);
    t.call.wide = dtype == ScalarType::Double;
    t.set_images(input[i], target[i]);
    set_layer(t, mask, i, target[i].sizes()[0]);
    signs.push_back(t.make_signs(input[i], save_signs));
    const auto partials = t.unit_sums();
    double total[2] = {0, 0};
    for (int64_t u = 0; u < t.call.units(); ++u) {
      total[0] += partials[4 * u];
      total[1] += partials[4 * u + 1];
    }
    scales[i] = weights[i] * sample_scale(norm, 0, total[1], static_cast<double>(t.call.shape.numel()), 1);
    loss += scales[i] * total[0];
  }
  return {make_scalar(input[0], loss, dtype),
          make_tensor(input[0], scales, {static_cast<int64_t>(layers)}, dtype), signs};
}

std::vector<Tensor> feature_distance_backward(
    const Tensor& grad,                // []
    const Tensor& scale,               // [layers]
    const std::vector<Tensor>& signs,  // l1
    const std::vector<Tensor>& mask, const std::vector<Tensor>& input, const std::vector<Tensor>& target,
    const std::vector<int64_t>& sizes,  // k N, C, H, W, N of each layer
    const std::vector<int64_t>& channels_last, const std::vector<int64_t>& dtypes, const std::string& penalty,
    double param) {
  // The order of ops/_checks.py: FLOATS.
  constexpr ScalarType kFloats[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16,
                                    ScalarType::Double};
  const std::vector<double> per_layer = coefficients(scale, {grad});
  int64_t elements = 0;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    elements += sizes[5 * i] * sizes[5 * i + 1] * sizes[5 * i + 2] * sizes[5 * i + 3];
  }
  std::vector<Tensor> out;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    const auto size = sizes.begin() + static_cast<int64_t>(5 * i);
    const ScalarType dtype = kFloats[dtypes[i]];
    PixelTensors t({{size, size + 4}, channels_last[i] != 0, dtype, dtype}, penalty, param);
    if (input.empty()) {
      t.set_saved(std::nullopt, std::nullopt, signs[i]);
    } else {
      // The gradient may be wanted in another dtype than the input's.
      t.call.pred_dtype = dtype_code(input[i].scalar_type());
      t.call.target_dtype = dtype_code(target[i].scalar_type());
      t.set_saved(input[i], target[i], std::nullopt);
    }
    t.call.wide = scale.scalar_type() == ScalarType::Double;
    set_layer(t, mask, i, size[4]);
    const std::vector<double> coefficient(static_cast<size_t>(size[0]), per_layer[i]);
    t.call.coefficient = coefficient.data();
    out.push_back(std::get<0>(t.gradients(grad, true, false, elements)));
  }
  return out;
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("feature_distance_cpu", TORCH_BOX(&ik::feature_distance));
  m.impl("feature_distance_backward_cpu", TORCH_BOX(&ik::feature_distance_backward));
}
