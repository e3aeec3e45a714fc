// From torch tensors to PairCall: what the ops total_variation and inpainting_pixel share.
#pragma once

#include "cpu/pairs.h"
#include "cpu/tensors.h"

namespace ik {

struct PairTensors : ImageTensors<PairCall> {
  PairTensors(const ImageKind& images, const std::string& region, const std::string& penalty,
              bool mask_is_hole)
      : ImageTensors(images) {
    call.step = kind.channels_last ? kind.size[1] : 1;
    call.rows = kind.size[2];
    call.width = kind.size[3] * call.step;
    call.region = parse_region(region);
    call.penalty = parse_penalty(penalty);
    call.mask_is_hole = mask_is_hole;
  }

  const Kernels<PairCall>& kernels() const { return IK_PICK_ISA(pair_kernels, call.wide); }

  void set_mask(const std::optional<Tensor>& mask) {
    if (!mask.has_value()) return;
    ImageTensors::set_mask(*mask, kind.size);
    call.mask_width = call.width / std::max<int64_t>(call.shape.mask_repeat, 1);
    call.mask_step = call.step / std::max<int64_t>(call.shape.mask_repeat, 1);
  }

  int64_t sign_bytes() const {
    const std::vector<int64_t>& size = kind.size;
    return size[0] * size[1] * size[2] * call.planes() * ((size[3] + 7) / 8);
  }

  // What follows the signs (ops/_pairs.py: fake_signs): a byte that is 1 for a mask of zeros and ones, and
  // its rows as bits.
  int64_t tail_bytes(const std::optional<Tensor>& mask) const {
    if (!mask.has_value()) return 0;
    const int64_t planes = mask->dim() == 4 ? mask->size(0) * mask->size(1) : 1;
    return 1 + planes * kind.size[2] * ((kind.size[3] + 7) / 8);
  }

  Tensor make_signs(const Tensor& like, const std::optional<Tensor>& mask, bool save_signs) {
    if (!save_signs) return empty_1d(like, 0, ScalarType::Byte);
    const int64_t used = call.shape.samples * call.shape.segments * call.rows * call.planes() * call.groups();
    return ImageTensors::make_signs(like, used, sign_bytes(), tail_bytes(mask), true);
  }

  void set_signs(const Tensor& signs, const std::optional<Tensor>& mask) {
    call.signs = static_cast<uint8_t*>(signs.data_ptr());
    call.pair_weights = call.region != Region::image;
    if (!mask.has_value() || call.signs[sign_bytes()] != 1) return;
    call.pair_weights = false;
    call.mask = call.signs + sign_bytes() + 1;
    call.mask_dtype = Dtype::bits;
  }

  // Runs the forward kernel: the sums of every sample.
  std::vector<PairSums> sample_sums() {
    const int64_t units = call.units();
    const int64_t samples = call.shape.samples;
    const int64_t per_sample = samples > 0 ? units / samples : 0;
    std::vector<PairSums> partials(static_cast<size_t>(units));
    std::vector<PairSums> sums(static_cast<size_t>(samples));
    call.sums = partials.data();
    run(kernels().forward);
    for (int64_t u = 0; u < units; ++u) sums[u / per_sample] += partials[u];
    return sums;
  }

  // d tv / d (sum down), d tv / d (sum across), with which `sum` makes tv.
  std::vector<double> tv_scales(PairNormalize normalize, const PairSums& sum) const {
    const std::vector<int64_t>& size = kind.size;
    const double planes = static_cast<double>(size[0] * size[1]);
    const double pairs_down = planes * static_cast<double>(std::max<int64_t>(size[2] - 1, 0) * size[3]);
    const double pairs_across = planes * static_cast<double>(size[2] * std::max<int64_t>(size[3] - 1, 0));
    std::vector<double> scales(2);
    pair_scales(normalize, pairs_down, pairs_across, static_cast<double>(call.shape.numel()), sum.region,
                scales.data());
    return scales;
  }

  std::tuple<Tensor, Tensor> gradients(const Tensor& like, bool need_pred, bool need_target,
                                       const std::vector<PairCoefficients>& coefficients) {
    call.coefficients = coefficients.data();
    return differentiate(like, need_pred, need_target, kernels().backward, call.shape.numel());
  }
};

}  // namespace ik
