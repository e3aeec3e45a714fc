// From torch tensors to PairCall: what the registrations of total_variation and inpainting_pixel share.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/op_args.h"
#include "cpu/pairs.h"
#include "cpu/pixel_op.h"

namespace ik {

// The tensors of one call; `ready` keeps copies alive that a layout change made.
struct PairTensors {
  PairCall call;
  std::vector<int64_t> size;
  bool channels_last = false;
  ScalarType dtype = ScalarType::Float;  // of losses and scales
  std::vector<Tensor> ready;

  PairTensors(const std::vector<int64_t>& image_size, bool is_channels_last, ScalarType pred,
              ScalarType target, const std::string& region, const std::string& penalty, bool mask_is_hole)
      : size(image_size), channels_last(is_channels_last) {
    call.shape = pixel_shape(size, channels_last);
    call.step = channels_last ? size[1] : 1;
    call.rows = size[2];
    call.width = size[3] * call.step;
    call.region = parse_region(region);
    call.penalty = parse_penalty(penalty);
    call.mask_is_hole = mask_is_hole;
    call.pred_dtype = dtype_code(pred);
    call.target_dtype = dtype_code(target);
    dtype = accumulate_type(pred, target);
    call.wide = dtype == ScalarType::Double;
  }

  const void* add(const Tensor& image) {
    ready.push_back(in_layout(image, channels_last));
    return ready.back().const_data_ptr();
  }

  // `target` makes a composite.
  void set_images(const Tensor& pred, const std::optional<Tensor>& target) {
    call.pred = add(pred);
    if (target.has_value()) call.target = add(*target);
  }

  void set_mask(const Tensor& mask) {
    call.mask_dtype = dtype_code(mask.scalar_type());
    ready.push_back(prepare_mask(mask, size, channels_last, call.shape));
    call.mask = ready.back().const_data_ptr();
    call.mask_width = call.width / std::max<int64_t>(call.shape.mask_repeat, 1);
    call.mask_step = call.step / std::max<int64_t>(call.shape.mask_repeat, 1);
  }

  int64_t sign_bytes() const { return size[0] * size[1] * size[2] * call.planes() * ((size[3] + 7) / 8); }

  // What follows the signs (ops/_pairs.py: fake_signs): a byte that is 1 for a mask of zeros and ones, and
  // its rows as bits.
  int64_t tail_bytes(const std::optional<Tensor>& mask) const {
    if (!mask.has_value()) return 0;
    const int64_t copies = mask->dim() == 4 ? mask->size(0) * mask->size(1) : 1;
    return 1 + copies * size[2] * ((size[3] + 7) / 8);
  }

  Tensor make_signs(const Tensor& like, const std::optional<Tensor>& mask, bool save_signs) {
    if (!save_signs) return empty_1d(like, 0, ScalarType::Byte);
    const int64_t used = call.shape.samples * call.shape.segments * call.rows * call.planes() * call.groups();
    Tensor signs = empty_1d(like, sign_bytes() + tail_bytes(mask), ScalarType::Byte);
    call.signs = static_cast<uint8_t*>(signs.mutable_data_ptr());
    // An output left unwritten in part would differ between runs.
    std::fill(call.signs + used, call.signs + signs.numel(), uint8_t(0));
    if (mask.has_value()) {
      call.binary = call.signs + sign_bytes();
      *call.binary = 1;
      call.mask_bits = call.binary + 1;
    }
    return signs;
  }

  void set_signs(const Tensor& signs, const std::optional<Tensor>& mask) {
    call.signs = static_cast<uint8_t*>(signs.data_ptr());
    call.pair_weights = call.region != Region::image;
    if (!mask.has_value() || call.signs[sign_bytes()] != 1) return;
    call.pair_weights = false;
    call.mask = call.signs + sign_bytes() + 1;
    call.mask_dtype = Dtype::bits;
  }
};

static inline const PairKernels& kernels_for(const PairCall& call) {
  return call.wide ? generic::pair_kernels_wide : IK_PICK_ISA(pair_kernels);
}

// Runs the forward kernel: the sums of every sample.
static inline std::vector<PairSums> sample_sums(PairCall& call) {
  const int64_t units = call.units();
  const int64_t samples = call.shape.samples;
  const int64_t per_sample = samples > 0 ? units / samples : 0;
  std::vector<PairSums> partials(static_cast<size_t>(units));
  std::vector<PairSums> found(static_cast<size_t>(samples));
  call.sums = partials.data();
  if (units > 0) run_units(call, kernels_for(call).forward);
  for (int64_t u = 0; u < units; ++u) {
    PairSums& sum = found[u / per_sample];
    sum.hole += partials[u].hole;
    sum.hole_weight += partials[u].hole_weight;
    sum.valid += partials[u].valid;
    sum.valid_weight += partials[u].valid_weight;
    sum.down += partials[u].down;
    sum.across += partials[u].across;
    sum.region += partials[u].region;
  }
  return found;
}

// d tv / d (sum down), d tv / d (sum across); writes tv and `scale` [2].
static inline void finish_total_variation(const PairTensors& t, PairNormalize normalize,
                                          const std::vector<PairSums>& sums, double& tv, Tensor& scale) {
  PairSums sum;
  for (const PairSums& sample : sums) {
    sum.down += sample.down;
    sum.across += sample.across;
    sum.region += sample.region;
  }
  const double planes = static_cast<double>(t.size[0] * t.size[1]);
  const double pairs_down = planes * static_cast<double>(std::max<int64_t>(t.size[2] - 1, 0) * t.size[3]);
  const double pairs_across = planes * static_cast<double>(t.size[2] * std::max<int64_t>(t.size[3] - 1, 0));
  std::vector<double> scales(2);
  pair_scales(normalize, pairs_down, pairs_across, static_cast<double>(t.call.shape.numel()), sum.region,
              scales.data());
  tv = scales[0] * sum.down + scales[1] * sum.across;
  t.call.wide ? write_scale<double>(scales, scale) : write_scale<float>(scales, scale);
}

// Allocates the gradients asked for and runs the backward kernel.
static inline std::tuple<Tensor, Tensor> pair_gradients(PairTensors& t, const Tensor& like,
                                                        ScalarType pred_dtype, ScalarType target_dtype,
                                                        bool need_pred, bool need_target,
                                                        const std::vector<PairCoefficients>& coefficients) {
  PairCall& call = t.call;
  call.coefficients = coefficients.data();
  const auto make = [&](bool needed, ScalarType dtype) {
    return needed ? empty_output(like, t.size, t.channels_last, dtype) : empty_1d(like, 0, dtype);
  };
  Tensor grad_pred = make(need_pred, pred_dtype);
  Tensor grad_target = make(need_target, target_dtype);
  if (need_pred) call.grad_pred = grad_pred.mutable_data_ptr();
  if (need_target) call.grad_target = grad_target.mutable_data_ptr();
  call.stream = call.shape.numel() * dtype_bytes(call.pred_dtype) > kStreamBytes;
  if (call.units() > 0) run_units(call, kernels_for(call).backward);
  return {grad_pred, grad_target};
}

}  // namespace ik
