// total_variation on CUDA: of an image, or of the composite of two without writing it.
//
//   forward   loss = s_0 sum of the pairs down + s_1 sum of those across; a pair is w p(next - this)
//   backward  d loss / d image = grad (the pairs that end at a pixel minus those that begin there),
//             each pair s w p'(next - this); of a composite pred gets that times the hole,
//             target times the rest
//
// Saved for backward: the scales and for l1 4 bits of signs an element; l2 needs the images. Work split:
// pairs.cuh; bytes: pairs_forward.cuh, pairs_backward.cuh. Two launches forward, one backward.
#include <torch/csrc/stable/library.h>

#include "cuda/pairs_launch.cuh"

namespace ik::cuda {
namespace {

bool is_square(const std::string& penalty) {
  const Penalty parsed = parse_penalty(penalty);
  STD_TORCH_CHECK(parsed == Penalty::l1 || parsed == Penalty::l2, "penalty: unknown value '", penalty, "'");
  return parsed == Penalty::l2;
}

std::tuple<Tensor, Tensor, Tensor> total_variation(
    const Tensor& image,                  // [N, C, H, W]
    const std::optional<Tensor>& target,  // [N, C, H, W]
    const std::optional<Tensor>& mask,    // [H, W] or [N|1, C|1, H, W]
    const std::string& region, const std::string& penalty, const std::string& normalize, bool mask_is_hole,
    bool save_signs) {
  const DeviceScope device(image);
  const bool square = is_square(penalty);
  STD_TORCH_CHECK(!save_signs || !square, "save_signs needs penalty l1");
  Tensor loss = empty_scalar(image, ScalarType::Float);
  Tensor scale = empty_1d(image, 2, ScalarType::Float);
  PairFinalArgs final{};
  final.tv = float_output(loss);
  final.tv_scale = float_output(scale);
  final.pair_normalize = parse_pair_normalize(normalize);
  const PairCall call{&image, pointer(target), pointer(mask), parse_region(region), mask_is_hole, square};
  Tensor signs = target.has_value() ? run_pairs_forward<Terms::composite>(device, call, save_signs, final)
                                    : run_pairs_forward<Terms::image>(device, call, save_signs, final);
  return {loss, scale, signs};
}

std::tuple<Tensor, Tensor> total_variation_backward(
    const Tensor& grad,                   // []
    const Tensor& scale,                  // [2] (down, across)
    const std::optional<Tensor>& signs,   // [bytes]
    const std::optional<Tensor>& mask,    // [H, W] or [N|1, C|1, H, W]
    const std::optional<Tensor>& image,   // [N, C, H, W]
    const std::optional<Tensor>& target,  // [N, C, H, W]
    const std::vector<int64_t>& size, bool channels_last, ScalarType image_dtype, ScalarType target_dtype,
    bool composite, const std::string& region, const std::string& penalty, bool mask_is_hole, bool need_image,
    bool need_target) {
  const DeviceScope device(scale);
  PairBackwardArgs args{};
  args.grad[3] = float_data(grad, "grad");
  args.tv_scale = float_data(scale, "scale");
  const PairCall call{pointer(image),       pointer(target), pointer(mask),
                      parse_region(region), mask_is_hole,    is_square(penalty)};
  const PairGradients wanted{size, channels_last, image_dtype, target_dtype, need_image, need_target};
  const auto run = composite ? run_pairs_backward<Terms::composite> : run_pairs_backward<Terms::image>;
  return run(device, call, wanted, pointer(signs), scale, args);
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("total_variation_cuda", TORCH_BOX(&ik::cuda::total_variation));
  m.impl("total_variation_backward_cuda", TORCH_BOX(&ik::cuda::total_variation_backward));
}
