// stacked_images on CUDA: prediction, composite and truth, normalised, as one batch.
//
//   forward   stacked[p N + n] = scale part_p(pred, target, mask)_n + shift, channels replicated or reversed
//   backward  d / d pred = sum_p weight of pred in part p * scale * grad[p N + n], d / d target likewise;
//             the gradient of a part in which no wanted image has a weight is not read
//
// Saved for backward: the mask. One launch each way. Work split and bytes: stacked_images.cuh.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>

#include "common/stacked_images.h"
#include "cuda/pixel_launch.cuh"
#include "cuda/stacked_images.cuh"

namespace ik::cuda {
namespace {

Share share_of_pred(Part part, bool mask_is_hole) {
  const Share hole = mask_is_hole ? Share::mask : Share::rest;
  if (part == Part::raw) return Share::all;
  return part == Part::composite || part == Part::hole_raw ? hole : Share::none;
}

Share share_of_target(Part part, bool mask_is_hole) {
  if (part == Part::target) return Share::all;
  if (part == Part::hole_target) return mask_is_hole ? Share::mask : Share::rest;
  return part == Part::composite ? (mask_is_hole ? Share::rest : Share::mask) : Share::none;
}

Tensor reversed_channels(const Tensor& mask) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(mask),
                                    torch::stable::detail::from(std::vector<int64_t>{1})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::flip", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// What forward and backward are asked, on the host.
struct StackedCall {
  const std::vector<int64_t>& size;  // of the images
  bool channels_last;
  const std::vector<int64_t>& parts;
  int64_t out_channels;
  bool swap;
  bool mask_is_hole;

  // In channels_last a swap reorders the elements of a pixel.
  bool reversed() const { return swap && channels_last && size[1] > 1; }
};

// The arguments of a launch, and the mask they point into.
struct StackedLaunch {
  StackedArgs args{};
  PixelShape shape;
  std::optional<Tensor> mask;

  explicit StackedLaunch(const StackedCall& call) : shape(pixel_shape(call.size, call.channels_last)) {
    STD_TORCH_CHECK(call.out_channels == shape.channels || shape.channels == 1,
                    "pred has several channels, scale or shift another number");
    const bool planes = shape.segments == shape.channels;
    args.samples = shape.samples;
    args.out_segments = static_cast<int32_t>(planes ? call.out_channels : 1);
    args.copies = static_cast<int32_t>(call.out_channels == shape.channels ? 1 : call.out_channels);
    args.channels = static_cast<int32_t>(planes ? 1 : shape.channels);
    args.swap = call.swap && planes && shape.channels > 1;
    args.reversed = call.reversed();
    STD_TORCH_CHECK(call.parts.size() <= kMostParts, "parts: the cuda backend takes at most 64");
  }

  // A part that shows none of the images `wanted` is left out if `skip`.
  void set_parts(const StackedCall& call, std::array<bool, 2> wanted, bool skip) {
    for (size_t place = 0; place < call.parts.size(); ++place) {
      STD_TORCH_CHECK(call.parts[place] >= 0 && call.parts[place] <= 4, "parts: unknown");
      const Part part = static_cast<Part>(call.parts[place]);
      const Share pred = wanted[0] ? share_of_pred(part, call.mask_is_hole) : Share::none;
      const Share target = wanted[1] ? share_of_target(part, call.mask_is_hole) : Share::none;
      if (skip && pred == Share::none && target == Share::none) continue;
      args.part[args.parts++] = {{pred, target}, static_cast<uint8_t>(place)};
    }
  }

  bool shows(int image) const {
    return std::any_of(args.part, args.part + args.parts,
                       [&](const PartShares& part) { return part.share[image] != Share::none; });
  }

  void set_mask(const StackedCall& call, const std::optional<Tensor>& given, bool reverse) {
    const bool needed = std::any_of(args.part, args.part + args.parts, [](const PartShares& part) {
      return std::max(part.share[0], part.share[1]) > Share::all;
    });
    if (!needed) return;
    STD_TORCH_CHECK(given.has_value(), "parts: one of them needs a mask");
    const bool interleaved = given->dim() == 4 && given->size(1) > 1;
    mask = prepare_mask(reverse && interleaved ? reversed_channels(*given) : *given, call.size,
                        call.channels_last, shape);
  }

  void set_constants(const StackedCall& call, const std::vector<double>& scale,
                     const std::vector<double>& shift, bool reverse) {
    args.constants = static_cast<int32_t>(std::max(scale.size(), shift.size()) > 1 ? call.out_channels : 1);
    STD_TORCH_CHECK(args.constants <= kMostConstants,
                    "scale, shift: the cuda backend takes them for at most 64 channels");
    const std::vector<double> scales = channel_constants(scale, 1.0, args.constants);
    const std::vector<double> shifts = channel_constants(shift, 0.0, args.constants);
    for (int32_t i = 0; i < args.constants; ++i) {
      const size_t from = static_cast<size_t>(reverse ? args.constants - 1 - i : i);
      args.constant[i] = {static_cast<float>(scales[from]), static_cast<float>(shifts[from])};
    }
  }

  // For vectors of `elements`; returns the blocks of the launch.
  unsigned set_tiling(int elements) {
    args.tiling = make_tiling(shape.samples, shape.segments, shape.length, elements);
    args.mask = mask_view(mask ? &*mask : nullptr, shape, args.tiling, elements);
    return grid_size(args.tiling, shape.samples);
  }
};

Tensor stacked_images(const Tensor& pred,                 // [N, C, H, W]
                      const Tensor& target,               // [N, C, H, W]
                      const std::optional<Tensor>& mask,  // [H, W] or [N|1, C|1, H, W]
                      const std::vector<int64_t>& parts, const std::vector<double>& scale,
                      const std::vector<double>& shift, bool swap, bool mask_is_hole) {
  const DeviceScope device(pred);
  const std::vector<int64_t> size(pred.sizes().begin(), pred.sizes().end());
  const bool channels_last = !pred.is_contiguous() && is_channels_last(pred);
  const int64_t channels =
      std::max({size[1], static_cast<int64_t>(scale.size()), static_cast<int64_t>(shift.size())});
  const StackedCall call{size, channels_last, parts, channels, swap, mask_is_hole};
  StackedLaunch launched(call);
  Tensor out = empty_image(pred, {static_cast<int64_t>(parts.size()) * size[0], channels, size[2], size[3]},
                           channels_last, wider_type(pred.scalar_type(), target.scalar_type()));
  if (launched.shape.numel() == 0) return out;
  launched.set_parts(call, {true, true}, false);
  launched.set_mask(call, mask, call.reversed());
  launched.set_constants(call, scale, shift, false);
  const Tensor images[2] = {launched.shows(0) ? in_layout(pred, channels_last) : pred,
                            launched.shows(1) ? in_layout(target, channels_last) : target};
  with_dtypes(pred.scalar_type(), target.scalar_type(), [&](auto p, auto t) {
    using P = typename decltype(p)::type;
    using T = typename decltype(t)::type;
    using S = Wider<P, T>;
    constexpr int E = kStackedElements<P, T, S>;
    const unsigned blocks = launched.set_tiling(E);
    StackedArgs& args = launched.args;
    const int64_t length = launched.shape.length;
    args.stacked = out.mutable_data_ptr();
    args.aligned = allows_vectors(args.stacked, length, E, sizeof(S));
    constexpr int64_t kBytes[2] = {sizeof(P), sizeof(T)};
    for (int i = 0; i < 2; ++i) {
      if (!launched.shows(i)) continue;
      args.image[i] = images[i].const_data_ptr();
      args.aligned = args.aligned && (args.reversed || is_aligned(args.image[i], E * kBytes[i]));
    }
    launch(stacked_forward<P, T>, blocks, kThreads, device, args);
  });
  return out;
}

std::tuple<Tensor, Tensor> stacked_images_backward(const Tensor& grad,  // [parts N, out channels, H, W]
                                                   const std::optional<Tensor>& mask,  // as forward
                                                   const std::vector<int64_t>& size, bool channels_last,
                                                   ScalarType pred_dtype, ScalarType target_dtype,
                                                   const std::vector<int64_t>& parts,
                                                   const std::vector<double>& scale, bool swap,
                                                   bool mask_is_hole, bool need_pred, bool need_target) {
  const DeviceScope device(grad);
  const StackedCall call{size, channels_last, parts, grad.size(1), swap, mask_is_hole};
  StackedLaunch launched(call);
  const auto gradient = [&](bool needed, ScalarType dtype) {
    return needed ? empty_image(grad, size, channels_last, dtype) : empty_1d(grad, 0, dtype);
  };
  Tensor grad_pred = gradient(need_pred, pred_dtype);
  Tensor grad_target = gradient(need_target, target_dtype);
  if (launched.shape.numel() == 0 || !(need_pred || need_target)) return {grad_pred, grad_target};
  STD_TORCH_CHECK(grad.scalar_type() == wider_type(pred_dtype, target_dtype) &&
                      grad.numel() == static_cast<int64_t>(parts.size()) * call.out_channels * size[0] *
                                          launched.shape.pixels,
                  "grad: expected the shape and dtype of the stacked batch");
  launched.set_parts(call, {need_pred, need_target}, true);
  launched.set_mask(call, mask, false);
  launched.set_constants(call, scale, {}, call.reversed());
  const Tensor ready = in_layout(grad, channels_last);
  StackedArgs& args = launched.args;
  args.stacked = const_cast<void*>(ready.const_data_ptr());  // which the kernel of the backward only reads
  const bool both = need_pred && need_target;
  args.gradient[0] = (need_pred ? grad_pred : grad_target).mutable_data_ptr();
  if (both) args.gradient[1] = grad_target.mutable_data_ptr();
  if (!need_pred) {
    for (int i = 0; i < args.parts; ++i) args.part[i].share[0] = args.part[i].share[1];
  }
  const auto run = [&](auto s, auto p, auto t) {
    using S = typename decltype(s)::type;
    using P = typename decltype(p)::type;
    using T = typename decltype(t)::type;
    constexpr int E = kStackedElements<S, P, T>;
    const unsigned blocks = launched.set_tiling(E);
    args.aligned =
        launched.shape.length % E == 0 && (args.reversed || is_aligned(args.stacked, E * sizeof(S)));
    launch(stacked_backward<S, P, T>, blocks, kThreads, device, args);
  };
  if (both) {
    with_dtypes(pred_dtype, target_dtype, [&](auto p, auto t) {
      run(Type<Wider<typename decltype(p)::type, typename decltype(t)::type>>(), p, t);
    });
  } else {
    with_dtype("gradient", need_pred ? pred_dtype : target_dtype, [&](auto p) {
      grad.scalar_type() == ScalarType::Float ? run(Type<float>(), p, Type<Nothing>())
                                              : run(p, p, Type<Nothing>());
    });
  }
  return {grad_pred, grad_target};
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("stacked_images_cuda", TORCH_BOX(&ik::cuda::stacked_images));
  m.impl("stacked_images_backward_cuda", TORCH_BOX(&ik::cuda::stacked_images_backward));
}
