// inpainting_pixel on CUDA: hole, valid and total variation of the composite from one read of the images.
//
//   forward   d = pred - target; hole = sum_n scale_n0 sum h |d|, valid likewise with v and scale_n1;
//             tv = s_0 sum of the weighted pairs down + s_1 sum of those across, of c = h pred + v target;
//             total = the three losses, each times its weight, added up
//   backward  d / d pred   =   (g_hole scale_n0 h + g_valid scale_n1 v) sign(d) + h G
//             d / d target = - (g_hole scale_n0 h + g_valid scale_n1 v) sign(d) + v G
//             with G = the weighted signs of the pairs that end at a pixel minus those that begin there
//
// Saved for backward: the scales and 6 bits of signs an element. Work split: pairs.cuh; bytes:
// pairs_forward.cuh, pairs_backward.cuh. Two launches forward, one backward.
#include <torch/csrc/stable/library.h>

#include "cuda/pairs_launch.cuh"

namespace ik::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> inpainting_pixel(
    const Tensor& pred,    // [N, C, H, W]
    const Tensor& target,  // [N, C, H, W]
    const Tensor& mask,    // [H, W] or [N|1, C|1, H, W]
    double hole_weight, double valid_weight, double tv_weight, const std::string& normalize,
    const std::string& tv_region, const std::string& tv_normalize, bool mask_is_hole, bool save_signs) {
  const DeviceScope device(pred);
  Tensor terms[4] = {empty_scalar(pred, ScalarType::Float), empty_scalar(pred, ScalarType::Float),
                     empty_scalar(pred, ScalarType::Float), empty_scalar(pred, ScalarType::Float)};
  Tensor scale = empty_strided(pred, {pred.size(0), 2}, {2, 1}, ScalarType::Float);
  Tensor tv_scale = empty_1d(pred, 2, ScalarType::Float);
  PairFinalArgs final{};
  final.total = float_output(terms[0]);
  final.hole = float_output(terms[1]);
  final.valid = float_output(terms[2]);
  final.tv = float_output(terms[3]);
  final.scale = float_output(scale);
  final.tv_scale = float_output(tv_scale);
  final.normalize = parse_normalize(normalize);
  final.pair_normalize = parse_pair_normalize(tv_normalize);
  final.weight[0] = hole_weight;
  final.weight[1] = valid_weight;
  final.weight[2] = tv_weight;
  const PairCall call{&pred, &target, &mask, parse_region(tv_region), mask_is_hole, /*square=*/false};
  Tensor signs = run_pairs_forward<Terms::losses>(device, call, save_signs, final);
  return {terms[0], terms[1], terms[2], terms[3], scale, tv_scale, signs};
}

std::tuple<Tensor, Tensor> inpainting_pixel_backward(const std::optional<Tensor>& grad_total,  // []
                                                     const std::optional<Tensor>& grad_hole,
                                                     const std::optional<Tensor>& grad_valid,
                                                     const std::optional<Tensor>& grad_tv,
                                                     const Tensor& scale,     // [N, 2] (hole, valid)
                                                     const Tensor& tv_scale,  // [2] (down, across)
                                                     const Tensor& signs,     // [bytes]
                                                     const Tensor& mask,      // [H, W] or [N|1, C|1, H, W]
                                                     const std::vector<int64_t>& size, bool channels_last,
                                                     ScalarType pred_dtype, ScalarType target_dtype,
                                                     double hole_weight, double valid_weight,
                                                     double tv_weight, const std::string& tv_region,
                                                     bool mask_is_hole, bool need_pred, bool need_target) {
  const DeviceScope device(scale);
  PairBackwardArgs args{};
  const std::optional<Tensor>* grads[4] = {&grad_total, &grad_hole, &grad_valid, &grad_tv};
  for (int i = 0; i < 4; ++i) {
    if (grads[i]->has_value()) args.grad[i] = float_data(**grads[i], "grad");
  }
  args.weight[0] = static_cast<float>(hole_weight);
  args.weight[1] = static_cast<float>(valid_weight);
  args.weight[2] = static_cast<float>(tv_weight);
  STD_TORCH_CHECK(scale.numel() == 2 * size[0] && scale.is_contiguous(),
                  "scale: expected a contiguous [N, 2] tensor");
  args.scale = float_data(scale, "scale");
  args.tv_scale = float_data(tv_scale, "tv_scale");
  const PairCall call{nullptr, nullptr, &mask, parse_region(tv_region), mask_is_hole, /*square=*/false};
  const PairGradients wanted{size, channels_last, pred_dtype, target_dtype, need_pred, need_target};
  return run_pairs_backward<Terms::losses>(device, call, wanted, &signs, scale, args);
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("inpainting_pixel_cuda", TORCH_BOX(&ik::cuda::inpainting_pixel));
  m.impl("inpainting_pixel_backward_cuda", TORCH_BOX(&ik::cuda::inpainting_pixel_backward));
}
