// CPU registration of stacked_images. The kernels are in stacked_images_kernels.cpp.
#include "cpu/isa.h"

#if defined(IK_ISA_GENERIC)

#include <algorithm>

#include "cpu/pixel_op.h"
#include "cpu/stacked_images.h"

namespace ik {
namespace {

const StackedKernels& kernels_for(const StackedCall& call) {
  return call.wide ? generic::stacked_kernels_wide : IK_PICK_ISA(stacked_kernels);
}

// The call, its constants for every channel, and copies that a layout change made.
struct StackedTensors {
  StackedCall call;
  std::vector<double> scale, shift;
  std::vector<Tensor> ready;

  StackedTensors(const std::vector<int64_t>& size, bool channels_last, ScalarType pred, ScalarType target,
                 const std::optional<Tensor>& mask, const std::vector<int64_t>& parts, int64_t out_channels,
                 const std::vector<double>& scales, const std::vector<double>& shifts, bool swap,
                 bool mask_is_hole) {
    call.shape = pixel_shape(size, channels_last);
    STD_TORCH_CHECK(out_channels == size[1] || size[1] == 1,
                    "pred has several channels, scale or shift another number");
    call.parts = parts.data();
    call.part_count = static_cast<int64_t>(parts.size());
    call.out_channels = out_channels;
    call.swap = swap;
    call.mask_is_hole = mask_is_hole;
    call.pred_dtype = dtype_code(pred);
    call.target_dtype = dtype_code(target);
    call.wide = accumulate_type(pred, target) == ScalarType::Double;
    for (const int64_t part : parts) {
      STD_TORCH_CHECK(part >= 0 && part <= 4 && (mask.has_value() || part == 0 || part == 2),
                      "parts: unknown, or one that needs a mask");
    }
    if (mask.has_value()) {
      call.mask_dtype = dtype_code(mask->scalar_type());
      ready.push_back(prepare_mask(*mask, size, channels_last, call.shape));
      call.mask = ready.back().const_data_ptr();
    }
    scale = channel_constants(scales, 1.0, out_channels);
    shift = channel_constants(shifts, 0.0, out_channels);
    call.scale = scale.data();
    call.shift = shift.data();
  }

  const void* add(const Tensor& image, bool channels_last) {
    ready.push_back(in_layout(image, channels_last));
    return ready.back().const_data_ptr();
  }
};

Tensor stacked_images(const Tensor& pred,    // [N, C, H, W]
                      const Tensor& target,  // [N, C, H, W]
                      const std::optional<Tensor>& mask, const std::vector<int64_t>& parts,
                      const std::vector<double>& scale, const std::vector<double>& shift, bool swap,
                      bool mask_is_hole) {
  const std::vector<int64_t> size(pred.sizes().begin(), pred.sizes().end());
  const bool channels_last = !pred.is_contiguous() && is_channels_last(pred);
  const int64_t channels = std::max(size[1], static_cast<int64_t>(std::max(scale.size(), shift.size())));
  StackedTensors t(size, channels_last, pred.scalar_type(), target.scalar_type(), mask, parts, channels,
                   scale, shift, swap, mask_is_hole);
  StackedCall& call = t.call;
  const ScalarType dtype = wider_type(pred.scalar_type(), target.scalar_type());
  Tensor out =
      empty_output(pred, {call.part_count * size[0], channels, size[2], size[3]}, channels_last, dtype);
  call.pred = t.add(pred, channels_last);
  call.target = t.add(target, channels_last);
  call.stacked = out.mutable_data_ptr();
  call.stacked_dtype = dtype_code(dtype);
  call.stream = out.numel() * dtype_bytes(call.stacked_dtype) > kStreamBytes;
  if (call.units() > 0) run_units(call, kernels_for(call).forward);
  return out;
}

std::tuple<Tensor, Tensor> stacked_images_backward(const Tensor& grad, const std::optional<Tensor>& mask,
                                                   const std::vector<int64_t>& size, bool channels_last,
                                                   ScalarType pred_dtype, ScalarType target_dtype,
                                                   const std::vector<int64_t>& parts,
                                                   const std::vector<double>& scale, bool swap,
                                                   bool mask_is_hole, bool need_pred, bool need_target) {
  STD_TORCH_CHECK(
      grad.dim() == 4 && size.size() == 4 &&
          grad.numel() == static_cast<int64_t>(parts.size()) * grad.size(1) * size[0] * size[2] * size[3],
      "grad: expected the shape of the stacked batch");
  StackedTensors t(size, channels_last, pred_dtype, target_dtype, mask, parts, grad.size(1), scale, {}, swap,
                   mask_is_hole);
  StackedCall& call = t.call;
  call.stacked = const_cast<void*>(t.add(grad, channels_last));
  call.stacked_dtype = dtype_code(grad.scalar_type());
  const auto make = [&](bool needed, ScalarType dtype) {
    return needed ? empty_output(grad, size, channels_last, dtype) : empty_1d(grad, 0, dtype);
  };
  Tensor grad_pred = make(need_pred, pred_dtype);
  Tensor grad_target = make(need_target, target_dtype);
  if (need_pred) call.grad_pred = grad_pred.mutable_data_ptr();
  if (need_target) call.grad_target = grad_target.mutable_data_ptr();
  call.stream = call.shape.numel() * dtype_bytes(call.pred_dtype) > kStreamBytes;
  if (call.units() > 0) run_units(call, kernels_for(call).backward);
  return {grad_pred, grad_target};
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("stacked_images_cpu", TORCH_BOX(&ik::stacked_images));
  m.impl("stacked_images_backward_cpu", TORCH_BOX(&ik::stacked_images_backward));
}

#endif
