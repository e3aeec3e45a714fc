// From torch tensors to PixelCall: what the ops masked_l1, hole_valid and feature_distance share.
#pragma once

#include "cpu/pixel.h"
#include "cpu/tensors.h"

namespace ik {

// What an l1 forward of `cpu` appends to the signs (ops/_pixel.py: fake_signs): a byte, and for two regions the
// mask as bits.
struct MaskTail {
  int64_t bytes = 1;
  bool packs = false;  // a plane that all channels share; an interleaved one would have to be spread first

  MaskTail(const PixelShape& shape, int regions, const Tensor& mask) {
    if (regions == 1 || shape.channels == 1) return;
    bytes += shape.samples * ((shape.pixels + 7) / 8);
    packs = shape.segments == shape.channels &&
            (mask.dim() == 2 || mask.sizes()[1] == 1 || mask.strides()[1] == 0);
  }
};

struct PixelTensors : ImageTensors<PixelCall> {
  PixelTensors(const ImageKind& images, const std::string& penalty, double param, int regions = 1)
      : ImageTensors(images) {
    call.penalty = parse_penalty(penalty);
    call.param = param;
    call.regions = regions;
    call.grad_pred_dtype = call.pred_dtype;
    call.grad_target_dtype = call.target_dtype;
  }

  const Kernels<PixelCall>& kernels() const { return IK_PICK_ISA(pixel_kernels, call.wide); }

  void set_forward(const Tensor& pred, const Tensor& target, const std::optional<Tensor>& mask) {
    STD_TORCH_CHECK(
        std::equal(kind.size.begin(), kind.size.end(), target.sizes().begin(), target.sizes().end()),
        "target must have the shape of pred");
    set_images(pred, target);
    if (mask.has_value()) set_mask(*mask, kind.size);
  }

  // What the forward saved: signs for l1, images for the other penalties.
  void set_saved(const std::optional<Tensor>& pred, const std::optional<Tensor>& target,
                 const std::optional<Tensor>& signs) {
    set_images(pred, target);
    if (signs.has_value()) call.signs = static_cast<uint8_t*>(signs->data_ptr());
    STD_TORCH_CHECK((call.penalty == Penalty::l1 ? call.signs != nullptr || call.shape.numel() == 0
                                                 : pred.has_value() && target.has_value()),
                    "the backward lacks what the forward saves for this penalty");
  }

  Tensor make_signs(const Tensor& like, bool save_signs, const std::optional<Tensor>& mask = std::nullopt) {
    if (!save_signs) return empty_1d(like, 0, ScalarType::Byte);
    const int64_t used = 2 * call.shape.samples * call.shape.segments * call.shape.groups();
    const int64_t sign_bytes = call.shape.sign_bytes();
    if (!mask.has_value()) return ImageTensors::make_signs(like, used, sign_bytes, 0, false);
    const MaskTail tail(call.shape, call.regions, *mask);
    return ImageTensors::make_signs(like, used, sign_bytes, tail.bytes, tail.packs);
  }

  // The mask of a backward: none where the signs tell all, else its bits if they were kept.
  void set_backward_mask(const std::optional<Tensor>& mask) {
    if (!mask.has_value()) return;
    if (call.penalty == Penalty::l1 && call.shape.numel() > 0) {
      const uint8_t* binary = call.signs + call.shape.sign_bytes();
      if (*binary == 1 && call.regions == 1) return;
      if (*binary == 1 && MaskTail(call.shape, call.regions, *mask).packs) {
        call.shape.has_mask = true;
        call.shape.mask_stride_n = 8 * call.shape.groups();
        call.mask = binary + 1;
        call.mask_dtype = Dtype::bits;
        return;
      }
    }
    set_mask(*mask, kind.size);
  }

  // Without a mask the planes of a sample are one run, whose sign groups fall on the same bytes if planes are
  // whole groups. Small planes then cost no more than large ones.
  void join_segments() {
    PixelShape& shape = call.shape;
    if (shape.has_mask || shape.length % 8 != 0) return;
    shape.length *= shape.segments;
    shape.segments = 1;
  }

  // What the forward kernel adds up: [units, 4], see PixelCall.
  std::unique_ptr<double[]> unit_sums() {
    join_segments();
    std::unique_ptr<double[]> partials(new double[static_cast<size_t>(4 * call.units())]);
    call.partials = partials.get();
    run(kernels().forward);
    return partials;
  }

  // Runs the forward kernel: the losses of the regions, and their scale [N, regions].
  std::tuple<std::array<double, 2>, std::vector<double>> reduce(Normalize normalize) {
    const auto partials = unit_sums();
    const int64_t samples = call.shape.samples;
    const int64_t per_sample = samples > 0 ? call.units() / samples : 0;
    const double numel = static_cast<double>(call.shape.numel());
    std::array<double, 2> losses{0, 0};
    std::vector<double> sums(static_cast<size_t>(samples * call.regions));
    std::vector<double> scales(sums.size());
    for (int r = 0; r < call.regions; ++r) {
      double weight = 0;
      for (int64_t n = 0; n < samples; ++n) {
        double sum = 0;
        double weight_n = 0;
        for (int64_t u = n * per_sample; u < (n + 1) * per_sample; ++u) {
          sum += partials[4 * u + 2 * r];
          weight_n += partials[4 * u + 2 * r + 1];
        }
        sums[n * call.regions + r] = sum;
        scales[n * call.regions + r] = weight_n;
        weight += weight_n;
      }
      for (int64_t n = 0; n < samples; ++n) {
        double& value = scales[n * call.regions + r];
        value = sample_scale(normalize, value, weight, numel, static_cast<double>(samples));
        losses[r] += value * sums[n * call.regions + r];
      }
    }
    return {losses, scales};
  }

  std::tuple<Tensor, Tensor> gradients(const Tensor& like, bool need_pred, bool need_target,
                                       int64_t elements) {
    join_segments();
    return differentiate(like, need_pred, need_target, kernels().backward, elements);
  }
};

// coefficient [N, regions] = grad of the region * scale; a missing gradient counts as 0.
static inline std::vector<double> coefficients(const Tensor& scale,
                                               const std::vector<std::optional<Tensor>>& grads) {
  const size_t regions = grads.size();
  std::vector<double> out = values_of(scale);
  for (size_t r = 0; r < regions; ++r) {
    const double grad = scalar_value(grads[r]);
    for (size_t n = r; n < out.size(); n += regions) out[n] *= grad;
  }
  return out;
}

}  // namespace ik
