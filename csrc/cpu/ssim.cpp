// ssim: sums of the kernels in isa/ssim.cpp to means of planes, and back.
#include "cpu/ssim.h"

#include "cpu/tensors.h"

namespace ik {
namespace {

StridedImage strided(const Tensor& t) {
  const auto strides = t.strides();
  return {const_cast<void*>(t.const_data_ptr()),
          dtype_code(t.scalar_type()),
          strides[0],
          strides[1],
          strides[2],
          strides[3]};
}

SsimCall ssim_call(const Tensor& pred, const Tensor& target, const std::optional<Tensor>& mask,
                   const std::vector<double>& window, bool same, double c1, double c2) {
  const std::vector<int64_t> size = sizes_of(pred);
  STD_TORCH_CHECK(size.size() == 4 && sizes_of(target) == size,
                  "pred and target must be images of one shape");
  SsimCall call;
  call.samples = size[0], call.channels = size[1], call.height = size[2], call.width = size[3];
  call.pred = strided(pred);
  call.target = strided(target);
  call.radius = static_cast<int>(window.size() / 2);
  STD_TORCH_CHECK(window.size() % 2 == 1 && call.radius >= 1 && call.radius <= kMaxRadius,
                  "window must have an odd number of weights from 3 to 15");
  const int64_t least = same ? 0 : static_cast<int64_t>(window.size());
  STD_TORCH_CHECK(size[2] >= least && size[3] >= least, "pred must not be smaller than the window");
  for (int k = 0; k <= call.radius; ++k) call.weights[k] = window[static_cast<size_t>(call.radius + k)];
  call.same = same;
  call.c1 = c1;
  call.c2 = c2;
  call.wide = accumulate_type(pred.scalar_type(), target.scalar_type()) == ScalarType::Double;
  if (mask.has_value() && pred.numel() > 0) {
    const int64_t dims = mask->dim();
    STD_TORCH_CHECK(dims == 2 || dims == 4, "mask must have 2 or 4 dimensions");
    const auto given = mask->sizes();
    const auto strides = mask->strides();
    int64_t steps[4] = {0, 0, 0, 0};
    for (int64_t dim = 0; dim < dims; ++dim) {
      const int64_t of = dim + 4 - dims;
      STD_TORCH_CHECK(given[dim] == 1 || given[dim] == size[of], "mask does not broadcast to pred");
      if (given[dim] > 1) steps[of] = strides[dim];
    }
    call.mask = {const_cast<void*>(mask->const_data_ptr()),
                 dtype_code(mask->scalar_type()),
                 steps[0],
                 steps[1],
                 steps[2],
                 steps[3]};
  }
  return call;
}

const Kernels<SsimCall>& kernels(const SsimCall& call) { return IK_PICK_ISA(ssim_kernels, call.wide); }

std::tuple<Tensor, Tensor, Tensor, Tensor> ssim(
    const Tensor& pred,                 // [N, C, H, W]
    const Tensor& target,               // [N, C, H, W]
    const std::optional<Tensor>& mask,  // [H, W], [N|1, C|1, H, W]
    const std::vector<double>& window, bool same, double c1, double c2, bool contrast, bool l1) {
  SsimCall call = ssim_call(pred, target, mask, window, same, c1, c2);
  call.contrast = contrast;
  call.l1 = l1;
  const int64_t planes = call.samples * call.channels, together = call.unit_channels();
  std::vector<SsimSums> units(static_cast<size_t>(call.units() * together));
  call.sums = units.data();
  run_units(call, kernels(call).forward, pred.numel() > 0 ? call.units() : 0, 1);
  const int64_t tiles = call.rows_of_tiles() * call.columns_of_tiles();
  std::vector<double> similarity(static_cast<size_t>(planes)), contrasts(similarity),
      scale(similarity.size() + 1);
  SsimSums all;
  for (int64_t plane = 0; plane < planes; ++plane) {
    SsimSums sum;
    const int64_t first = plane / together * tiles;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += units[(first + tile) * together + plane % together];
    const double of = sum.windows == 0 ? 0 : 1 / sum.windows;
    similarity[plane] = of == 0 ? 1 : sum.similarity / sum.windows;
    contrasts[plane] = of == 0 ? 1 : sum.contrast / sum.windows;
    scale[plane] = of;
    all += sum;
  }
  scale[planes] = all.pixels == 0 ? 0 : 1 / all.pixels;
  const ScalarType dtype = accumulate_type(pred.scalar_type(), target.scalar_type());
  const std::vector<int64_t> size = {call.samples, call.channels};
  return {make_tensor(pred, similarity, size, dtype),
          contrast ? make_tensor(pred, contrasts, size, dtype) : empty_1d(pred, 0, dtype),
          l1 ? make_scalar(pred, scale[planes] * all.l1, dtype) : empty_1d(pred, 0, dtype),
          make_tensor(pred, scale, {planes + 1}, dtype)};
}

std::tuple<Tensor, Tensor> ssim_backward(const std::optional<Tensor>& grad_similarity,  // [N, C]
                                         const std::optional<Tensor>& grad_contrast,    // [N, C]
                                         const std::optional<Tensor>& grad_l1,          // []
                                         const Tensor& scale,                           // [N C + 1]
                                         const Tensor& pred,                            // [N, C, H, W]
                                         const Tensor& target,                          // [N, C, H, W]
                                         const std::optional<Tensor>& mask,  // [H, W], [N|1, C|1, H, W]
                                         const std::vector<double>& window, bool same, double c1, double c2,
                                         bool need_pred, bool need_target) {
  SsimCall call = ssim_call(pred, target, mask, window, same, c1, c2);
  std::vector<SsimCoefficients> coefficients(static_cast<size_t>(call.samples * call.channels));
  const auto values = [&](const std::optional<Tensor>& grad) {
    return grad.has_value() ? values_of(*grad) : std::vector<double>(coefficients.size());
  };
  const std::vector<double> similarity = values(grad_similarity), contrast = values(grad_contrast);
  const std::vector<double> scales = values_of(scale);
  STD_TORCH_CHECK(similarity.size() == coefficients.size() && contrast.size() == coefficients.size() &&
                      scales.size() == coefficients.size() + 1 &&
                      (!grad_l1.has_value() || grad_l1->numel() == 1),
                  "gradients and scale must have a number for each plane, and one for l1");
  const double l1 = scalar_value(grad_l1) * scales[coefficients.size()];
  for (size_t i = 0; i < coefficients.size(); ++i) {
    coefficients[i] = {similarity[i] * scales[i], contrast[i] * scales[i], l1};
  }
  call.coefficients = coefficients.data();
  const auto make = [&](bool needed, const Tensor& like, StridedImage& image) {
    if (!needed) return empty_1d(like, 0, like.scalar_type());
    Tensor out = empty_output(like, sizes_of(like), !like.is_contiguous() && is_channels_last(like),
                              like.scalar_type());
    image = strided(out);
    return out;
  };
  Tensor to_pred = make(need_pred, pred, call.grad_pred);
  Tensor to_target = make(need_target, target, call.grad_target);
  if (need_pred || need_target)
    run_units(call, kernels(call).backward, pred.numel() > 0 ? call.units() : 0, 1);
  return {to_pred, to_target};
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("ssim_cpu", TORCH_BOX(&ik::ssim));
  m.impl("ssim_backward_cpu", TORCH_BOX(&ik::ssim_backward));
}
