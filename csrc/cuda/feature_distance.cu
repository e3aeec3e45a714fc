// feature_distance on CUDA: masked distance of feature maps, summed over layers, k predictions against one
// target.
//
//   forward   loss = sum_l scale_l sum w penalty(input_l - target_l), scale_l = weight_l / D_l
//   backward  d loss / d input_l = grad scale_l w penalty'(d); the caller sums it for the target
//
// Saved for backward: scale and, for l1, the signs of d (2 bits an element); the other penalties need input
// and target. The kernels are those of pixel.cuh, with one region. Up to 8 layers of one pair of dtypes: two
// launches forward, one backward.
#include <torch/csrc/stable/library.h>

#include "cuda/pixel_launch.cuh"

namespace ik::cuda {
namespace {

std::tuple<Tensor, Tensor, std::vector<Tensor>> feature_distance(
    const std::vector<Tensor>& input,   // [k N, C, H, W] each
    const std::vector<Tensor>& target,  // [N, C, H, W] each
    const std::vector<Tensor>& mask,    // none, or [H, W] or [1|N|k N, 1|C, H, W] each
    const std::vector<double>& weights, const std::string& penalty, double param,
    const std::string& normalize, bool save_signs) {
  const size_t count = input.size();
  STD_TORCH_CHECK(count > 0 && target.size() == count && weights.size() == count &&
                      (mask.empty() || mask.size() == count),
                  "feature_distance: input, target, mask and weights must have one entry for each layer");
  std::vector<LayerTensors> layers;
  for (size_t i = 0; i < count; ++i) {
    layers.push_back(image_layer(input[i], target[i], mask.empty() ? nullptr : &mask[i]));
  }
  Tensor scale = empty_1d(input[0], static_cast<int64_t>(count), ScalarType::Float);
  const PixelResult result =
      run_forward<1>({parse_penalty(penalty), static_cast<float>(param), false, /*per_sample=*/false}, layers,
                     weights, parse_normalize(normalize), save_signs, scale);
  return {result.loss[0], scale, result.signs};
}

std::vector<Tensor> feature_distance_backward(
    const Tensor& grad,                 // []
    const Tensor& scale,                // [layers]
    const std::vector<Tensor>& signs,   // [bytes] each, l1
    const std::vector<Tensor>& mask,    // as forward
    const std::vector<Tensor>& input,   // [k N, C, H, W] each, other penalties
    const std::vector<Tensor>& target,  // [N, C, H, W] each, other penalties
    const std::vector<int64_t>& sizes,  // k N, C, H, W, N of every layer
    const std::vector<int64_t>& channels_last,
    const std::vector<int64_t>& dtypes,  // of the gradients: float32, float16, bfloat16
    const std::string& penalty, double param) {
  const size_t count = dtypes.size();
  const auto one_each = [&](const std::vector<Tensor>& list) { return list.empty() || list.size() == count; };
  STD_TORCH_CHECK(sizes.size() == 5 * count && channels_last.size() == count && one_each(mask) &&
                      one_each(signs) && one_each(input) && one_each(target),
                  "feature_distance: every list must have one entry for each layer");
  std::vector<LayerTensors> layers;
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(dtypes[i] >= 0 && dtypes[i] < 3,
                    "dtypes: the cuda backend takes float16, bfloat16 and float32");
    const auto dtype = std::array{ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}[dtypes[i]];
    const auto first = sizes.begin() + static_cast<int64_t>(5 * i);
    const auto given = [&](const std::vector<Tensor>& list) { return list.empty() ? nullptr : &list[i]; };
    layers.push_back({{first, first + 4},
                      first[4],
                      channels_last[i] != 0,
                      given(mask),
                      given(input),
                      given(target),
                      given(signs)});
    gradients.push_back(empty_image(scale, layers[i].size, layers[i].channels_last, dtype));
  }
  for (size_t i = 0; i < count; ++i) layers[i].grad_input = &gradients[i];
  run_backward<1>({parse_penalty(penalty), static_cast<float>(param), false, /*per_sample=*/false}, layers,
                  {&grad}, scale);
  return gradients;
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("feature_distance_cuda", TORCH_BOX(&ik::cuda::feature_distance));
  m.impl("feature_distance_backward_cuda", TORCH_BOX(&ik::cuda::feature_distance_backward));
}
