// stacked_images. The kernels are in isa/stacked_images.cpp.
#include "cpu/stacked_images.h"

#include "cpu/tensors.h"

namespace ik {
namespace {

struct StackedTensors : ImageTensors<StackedCall> {
  std::vector<double> scale, shift;  // for every channel

  StackedTensors(const ImageKind& images, const std::optional<Tensor>& mask,
                 const std::vector<int64_t>& parts, int64_t out_channels, const std::vector<double>& scales,
                 const std::vector<double>& shifts, bool swap, bool mask_is_hole)
      : ImageTensors(images),
        scale(channel_constants(scales, 1.0, out_channels)),
        shift(channel_constants(shifts, 0.0, out_channels)) {
    STD_TORCH_CHECK(out_channels == kind.size[1] || kind.size[1] == 1,
                    "pred has several channels, scale or shift another number");
    call.parts = parts.data();
    call.part_count = static_cast<int64_t>(parts.size());
    call.out_channels = out_channels;
    call.swap = swap;
    call.mask_is_hole = mask_is_hole;
    for (const int64_t part : parts) {
      STD_TORCH_CHECK(part >= 0 && part <= 4 && (mask.has_value() || part == 0 || part == 2),
                      "parts: unknown, or one that needs a mask");
    }
    if (mask.has_value()) set_mask(*mask, kind.size);
    call.scale = scale.data();
    call.shift = shift.data();
  }

  const Kernels<StackedCall>& kernels() const { return IK_PICK_ISA(stacked_kernels, call.wide); }
};

Tensor stacked_images(const Tensor& pred,    // [N, C, H, W]
                      const Tensor& target,  // [N, C, H, W]
                      const std::optional<Tensor>& mask, const std::vector<int64_t>& parts,
                      const std::vector<double>& scale, const std::vector<double>& shift, bool swap,
                      bool mask_is_hole) {
  const int64_t channels = std::max(pred.size(1), static_cast<int64_t>(std::max(scale.size(), shift.size())));
  StackedTensors t(ImageKind::of(pred, target), mask, parts, channels, scale, shift, swap, mask_is_hole);
  StackedCall& call = t.call;
  const std::vector<int64_t>& size = t.kind.size;
  const ScalarType dtype = wider_type(t.kind.pred, t.kind.target);
  Tensor out = empty_output(pred, {call.part_count * size[0], channels, size[2], size[3]},
                            t.kind.channels_last, dtype);
  t.set_images(pred, target);
  call.stacked = out.mutable_data_ptr();
  call.stacked_dtype = dtype_code(dtype);
  call.stream = out.numel() * dtype_bytes(call.stacked_dtype) > kStreamBytes;
  t.run(t.kernels().forward);
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
  StackedTensors t({size, channels_last, pred_dtype, target_dtype}, mask, parts, grad.size(1), scale, {},
                   swap, mask_is_hole);
  t.call.stacked = const_cast<void*>(t.add(grad));
  t.call.stacked_dtype = dtype_code(grad.scalar_type());
  return t.differentiate(grad, need_pred, need_target, t.kernels().backward, t.call.shape.numel());
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("stacked_images_cpu", TORCH_BOX(&ik::stacked_images));
  m.impl("stacked_images_backward_cpu", TORCH_BOX(&ik::stacked_images_backward));
}
