// style on CUDA: distance of the Gram matrices of two sets of features, summed over layers.
//
//   forward   D = G(input)[j N + n] - G(target)[n]; loss = sum over layers of w coefficient sum p(D);
//             F = 2 s w coefficient p'(D), [k N, C, C]
//   backward  d loss / d input_n = F_n X_n, d loss / d target_n = - (sum_j F_(j N + n)) X_n
//
// Saved for backward: F and references to the features. Three launches forward and three backward for up to 8
// layers of one dtype and layout. Work split, bytes and numerics: gram_kernels.cuh, symmetric_product.cuh,
// gram_tile.cuh.
#include <torch/csrc/stable/library.h>

#include "cuda/gram_launch.cuh"

namespace ik::cuda {
namespace {

StyleLayer style_layer(const Tensor& input, const Tensor& target, double weight, GramNormalize normalize,
                       bool target_is_gram) {
  StyleLayer layer{Features(input), std::nullopt, std::nullopt, 1.0, 1.0, 0.0};
  const double channels = static_cast<double>(layer.input.channels());
  const double pixels = static_cast<double>(layer.input.pixels());
  layer.input_scale = gram_scale(normalize, channels, pixels);
  layer.weight =
      weight * style_coefficient(normalize, channels, pixels, static_cast<double>(layer.input.samples()));
  if (target_is_gram) {
    STD_TORCH_CHECK(target.dim() == 3 && target.sizes()[1] == layer.input.channels() &&
                        target.sizes()[2] == layer.input.channels(),
                    "target: expected Gram matrices [N, C, C]");
    layer.gram = torch::stable::contiguous(torch::stable::to(target, ScalarType::Float));
  } else {
    layer.target.emplace(target);
    STD_TORCH_CHECK(layer.target->channels() == layer.input.channels(), "target: other channels than input");
    layer.target_scale = gram_scale(normalize, channels, static_cast<double>(layer.target->pixels()));
  }
  const int64_t batch = target.sizes()[0];
  STD_TORCH_CHECK(batch > 0 ? layer.input.samples() % batch == 0 : layer.input.samples() == 0,
                  "input: its batch must be a multiple of the target's");
  return layer;
}

std::tuple<Tensor, std::vector<Tensor>> style(
    const std::vector<Tensor>& input,   // [k N, C, H, W] each
    const std::vector<Tensor>& target,  // [N, C, H', W'] or [N, C, C]
    const std::vector<double>& weights, const std::string& penalty, const std::string& normalize,
    bool target_is_gram, bool save) {
  STD_TORCH_CHECK(input.size() == target.size() && input.size() == weights.size() && !input.empty(),
                  "style: input, target and weights must have one entry for each layer");
  const DeviceScope device(input[0]);
  std::vector<StyleLayer> layers;
  std::vector<Tensor> factors;
  for (size_t i = 0; i < input.size(); ++i) {
    layers.push_back(
        style_layer(input[i], target[i], weights[i], parse_gram_normalize(normalize), target_is_gram));
    const int64_t N = input[i].sizes()[0];
    const int64_t C = input[i].sizes()[1];
    factors.push_back(save ? empty_strided(input[i], {N, C, C}, {C * C, C, 1}, ScalarType::Float)
                           : empty_1d(input[i], 0, ScalarType::Float));
  }
  const Tensor loss = style_loss(layers, penalty == "l1", save ? &factors : nullptr, device);
  return {loss, factors};
}

std::vector<Tensor> style_backward(const Tensor& grad,                   // []
                                   const std::vector<Tensor>& factors,   // [k N, C, C] each
                                   const std::vector<Tensor>& features,  // [N, C, H, W] each
                                   double sign) {
  STD_TORCH_CHECK(factors.size() == features.size(), "style: factors and features must have the same layers");
  const DeviceScope device(grad);
  std::vector<Product> products;
  for (size_t i = 0; i < features.size(); ++i) {
    products.push_back(Product{Features(features[i]), factors[i], /*add_transposed=*/false,
                               static_cast<float>(sign), &grad});
  }
  return symmetric_products(products, device);
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("style_cuda", TORCH_BOX(&ik::cuda::style));
  m.impl("style_backward_cuda", TORCH_BOX(&ik::cuda::style_backward));
}
