// CPU registration of feature_distance, layer by layer on the kernels of pixel.cpp.
#include "cpu/isa.h"

#if defined(IK_ISA_GENERIC)

#include "cpu/pixel_op.h"

namespace ik {
namespace {

// The mask of a layer; its batch is 1, the target's or pred's.
void set_layer_mask(PixelTensors& t, const Tensor& mask, int64_t batch) {
  std::vector<int64_t> size = t.size;
  t.call.mask_per_copy = mask.dim() == 4 && mask.sizes()[0] == size[0] && size[0] != batch;
  if (!t.call.mask_per_copy) size[0] = batch;
  t.call.mask_dtype = dtype_code(mask.scalar_type());
  t.call.mask = t.add(prepare_mask(mask, size, t.channels_last, t.call.shape), false);
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
  ScalarType dtype = ScalarType::Float;
  for (size_t i = 0; i < layers; ++i) {
    const ScalarType layer = accumulate_type(input[i].scalar_type(), target[i].scalar_type());
    if (layer == ScalarType::Double) dtype = layer;
  }
  std::vector<Tensor> signs;
  std::vector<double> scales(layers);
  double loss = 0;
  for (size_t i = 0; i < layers; ++i) {
    const int64_t batch = target[i].sizes()[0];
    PixelTensors t;
    t.set_call(input[i], penalty, param);
    t.set_types(input[i].scalar_type(), target[i].scalar_type());
    t.call.wide = dtype == ScalarType::Double;  // one float64 layer makes the op float64
    t.set_images(input[i], target[i]);
    if (batch > 0) t.call.copies = t.size[0] / batch;
    if (!mask.empty()) set_layer_mask(t, mask[i], batch);
    signs.push_back(make_signs(t, input[i], save_signs));
    const Sums sums = unit_sums(t.call);
    double total[2] = {0, 0};
    for (size_t u = 0; u < sums.units; ++u) {
      total[0] += sums.partials[4 * u];
      total[1] += sums.partials[4 * u + 1];
    }
    scales[i] = weights[i] * sample_scale(norm, 0, total[1], static_cast<double>(t.call.shape.numel()), 1);
    loss += scales[i] * total[0];
  }
  const bool wide = dtype == ScalarType::Double;
  Tensor out = empty_scalar(input[0], dtype);
  write_scalar(loss, wide, out);
  Tensor scale = empty_1d(input[0], static_cast<int64_t>(layers), dtype);
  wide ? write_scale<double>(scales, scale) : write_scale<float>(scales, scale);
  return {out, scale, signs};
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
    const std::vector<int64_t> size(sizes.begin() + static_cast<int64_t>(5 * i),
                                    sizes.begin() + static_cast<int64_t>(5 * i + 4));
    const int64_t batch = sizes[5 * i + 4];
    const ScalarType dtype = kFloats[dtypes[i]];
    const bool l1 = input.empty();
    const auto only = [](bool kept, const std::vector<Tensor>& of, size_t layer) {
      return kept ? std::optional<Tensor>(of[layer]) : std::nullopt;
    };
    PixelTensors t = backward_tensors(only(!l1, input, i), only(!l1, target, i), only(l1, signs, i), size,
                                      channels_last[i] != 0, l1 ? dtype : input[i].scalar_type(),
                                      l1 ? dtype : target[i].scalar_type(), penalty, param);
    t.call.wide = scale.scalar_type() == ScalarType::Double;
    // The gradient may be wanted in another dtype than the input's.
    t.call.grad_pred_dtype = dtype_code(dtype);
    if (batch > 0) t.call.copies = size[0] / batch;
    if (!mask.empty()) set_layer_mask(t, mask[i], batch);
    const std::vector<double> coefficient(static_cast<size_t>(size[0]), per_layer[i]);
    t.call.coefficient = coefficient.data();
    out.push_back(std::get<0>(differentiate(t, grad, dtype, dtype, true, false, elements)));
  }
  return out;
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("feature_distance_cpu", TORCH_BOX(&ik::feature_distance));
  m.impl("feature_distance_backward_cpu", TORCH_BOX(&ik::feature_distance_backward));
}

#endif
