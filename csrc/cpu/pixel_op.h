// From torch tensors to PixelCall, and the parallel loops: what the registrations of masked_l1 and hole_valid
// share.
#pragma once

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "common/op_args.h"
#include "cpu/convert.h"
#include "cpu/output.h"
#include "cpu/pixel.h"
#include "cpu/scalar.h"
#include "cpu/torch_dtype.h"

namespace ik {

// A thread takes at least this many elements: below it waking the second one costs more than it gives.
constexpr int64_t kGrainElements = 32768;

static inline const PixelKernels& kernels_for(const PixelCall& call) {
  return call.wide ? generic::pixel_kernels_wide : IK_PICK_ISA(pixel_kernels);
}

// Call: what `kernel` is called with, PixelCall or PairCall.
template <typename Call>
static inline void run_units(const Call& call, void (*kernel)(const Call&, int64_t, int64_t)) {
  const int64_t units = call.units();
  const int64_t elements = call.shape.numel() / (units > 0 ? units : 1);
  const int64_t grain = kGrainElements / (elements > 0 ? elements : 1) + 1;
  if (units <= grain) return kernel(call, 0, units);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

// The tensors of one call; `ready` keeps copies alive that a layout change made.
struct PixelTensors {
  PixelCall call;
  std::vector<int64_t> size;
  bool channels_last = false;
  ScalarType dtype = ScalarType::Float;  // of losses and sums
  std::vector<Tensor> ready;

  void set_call(const Tensor& pred, const std::string& penalty, double param) {
    STD_TORCH_CHECK(pred.dim() == 4, "pred must have 4 dimensions (N, C, H, W)");
    size.assign(pred.sizes().begin(), pred.sizes().end());
    channels_last = !pred.is_contiguous() && is_channels_last(pred);
    call.shape = pixel_shape(size, channels_last);
    call.penalty = parse_penalty(penalty);
    call.param = param;
  }

  const void* add(const Tensor& tensor, bool image) {
    ready.push_back(image ? in_layout(tensor, channels_last) : tensor);
    return ready.back().const_data_ptr();
  }

  void set_images(const std::optional<Tensor>& pred, const std::optional<Tensor>& target) {
    if (pred.has_value()) call.pred = add(*pred, true);
    if (target.has_value()) call.target = add(*target, true);
  }

  void set_mask(const std::optional<Tensor>& mask) {
    if (!mask.has_value()) return;
    call.mask_dtype = dtype_code(mask->scalar_type());
    call.mask = add(prepare_mask(*mask, size, channels_last, call.shape), false);
  }

  void set_types(ScalarType pred, ScalarType target) {
    call.pred_dtype = dtype_code(pred);
    call.target_dtype = dtype_code(target);
    call.grad_pred_dtype = call.pred_dtype;
    call.grad_target_dtype = call.target_dtype;
    dtype = accumulate_type(pred, target);
    call.wide = dtype == ScalarType::Double;
  }
};

static inline PixelTensors forward_tensors(const Tensor& pred, const Tensor& target,
                                           const std::optional<Tensor>& mask, const std::string& penalty,
                                           double param) {
  PixelTensors t;
  t.set_call(pred, penalty, param);
  STD_TORCH_CHECK(std::equal(t.size.begin(), t.size.end(), target.sizes().begin(), target.sizes().end()),
                  "target must have the shape of pred");
  t.set_types(pred.scalar_type(), target.scalar_type());
  t.set_images(pred, target);
  t.set_mask(mask);
  return t;
}

static inline PixelTensors backward_tensors(const std::optional<Tensor>& pred,
                                            const std::optional<Tensor>& target,
                                            const std::optional<Tensor>& signs,
                                            const std::vector<int64_t>& size, bool channels_last,
                                            ScalarType pred_dtype, ScalarType target_dtype,
                                            const std::string& penalty, double param) {
  PixelTensors t;
  t.size = size;
  t.channels_last = channels_last;
  t.call.shape = pixel_shape(size, channels_last);
  t.call.penalty = parse_penalty(penalty);
  t.call.param = param;
  t.set_types(pred_dtype, target_dtype);
  t.set_images(pred, target);
  if (signs.has_value()) t.call.signs = static_cast<uint8_t*>(signs->data_ptr());
  STD_TORCH_CHECK((t.call.penalty == Penalty::l1 ? t.call.signs != nullptr || t.call.shape.numel() == 0
                                                 : pred.has_value() && target.has_value()),
                  "the backward lacks what the forward saves for this penalty");
  return t;
}

// What an l1 forward of `cpu` appends to the signs (ops/_pixel.py: fake_signs), so that its backward need not
// read a mask of zeros and ones again: a byte that is 1 for such a mask, and for two regions that mask as
// bits.
struct MaskTail {
  int64_t at = 0;
  int64_t bits_bytes = 0;
  bool packs = false;  // a plane that all channels share; an interleaved one would have to be spread first

  MaskTail(const PixelShape& shape, int regions, const Tensor& mask) {
    at = shape.sign_bytes();
    if (regions == 1 || shape.channels == 1) return;
    bits_bytes = shape.samples * ((shape.pixels + 7) / 8);
    packs = shape.segments == shape.channels &&
            (mask.dim() == 2 || mask.sizes()[1] == 1 || mask.strides()[1] == 0);
  }
  int64_t bytes() const { return 1 + bits_bytes; }
};

static inline Tensor make_signs(PixelTensors& t, const Tensor& like, bool save_signs,
                                const std::optional<Tensor>& mask = std::nullopt) {
  PixelCall& call = t.call;
  if (!save_signs) return empty_1d(like, 0, ScalarType::Byte);
  const int64_t sign_bytes = call.shape.sign_bytes();
  std::optional<MaskTail> tail;
  if (mask.has_value()) tail.emplace(call.shape, call.regions, *mask);
  Tensor signs = empty_1d(like, sign_bytes + (tail ? tail->bytes() : 0), ScalarType::Byte);
  call.signs = static_cast<uint8_t*>(signs.mutable_data_ptr());
  // channels_last may need fewer groups; an output left unwritten in part would differ between runs.
  const int64_t used = 2 * call.shape.samples * call.shape.segments * call.shape.groups();
  std::fill(call.signs + used, call.signs + sign_bytes, uint8_t(0));
  if (!tail) return signs;
  call.binary = call.signs + sign_bytes;
  *call.binary = 1;
  uint8_t* bits = call.binary + 1;
  if (tail->packs) {
    call.mask_bits = bits;
  } else {
    std::fill(bits, bits + tail->bits_bytes, uint8_t(0));
  }
  return signs;
}

// The mask of a backward, with t.call.regions set: none where the signs tell all, else its bits if they were
// kept.
static inline void set_backward_mask(PixelTensors& t, const std::optional<Tensor>& mask) {
  if (!mask.has_value()) return;
  PixelCall& call = t.call;
  if (call.penalty == Penalty::l1 && call.shape.numel() > 0) {
    const MaskTail tail(call.shape, call.regions, *mask);
    if (call.signs[tail.at] == 1) {
      if (call.regions == 1) return;
      if (tail.packs) {
        call.shape.has_mask = true;
        call.shape.mask_stride_n = 8 * call.shape.groups();
        call.mask = call.signs + tail.at + 1;
        call.mask_dtype = Dtype::bits;
        return;
      }
    }
  }
  t.set_mask(mask);
}

template <typename T>
static void write_scale(const std::vector<double>& values, Tensor& scale) {
  T* out = static_cast<T*>(scale.mutable_data_ptr());
  for (size_t i = 0; i < values.size(); ++i) out[i] = static_cast<T>(values[i]);
}

// Without a mask the planes of a sample are one run, whose sign groups fall on the same bytes if planes are
// whole groups. Small planes then cost no more than large ones.
static inline void join_segments(PixelShape& shape) {
  if (shape.has_mask || shape.length % 8 != 0) return;
  shape.length *= shape.segments;
  shape.segments = 1;
}

// What the forward kernel adds up: [units, 4], see PixelCall.
struct Sums {
  size_t units;
  std::unique_ptr<double[]> partials;
};

static inline Sums unit_sums(PixelCall& call) {
  join_segments(call.shape);
  const size_t units = static_cast<size_t>(call.units());
  Sums sums{units, std::unique_ptr<double[]>(new double[4 * units])};
  call.partials = sums.partials.get();
  run_units(call, kernels_for(call).forward);
  return sums;
}

// Runs the forward kernel, writes the losses of the regions and `scale` [N, regions].
static inline void reduce(PixelTensors& t, Normalize normalize, Tensor* losses, Tensor& scale) {
  PixelCall& call = t.call;
  const Sums unit = unit_sums(call);
  const double* partials = unit.partials.get();
  const int64_t units = call.units();
  const int64_t samples = call.shape.samples;
  const int64_t per_sample = samples > 0 ? units / samples : 0;
  const double numel = static_cast<double>(call.shape.numel());
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
    double loss = 0;
    for (int64_t n = 0; n < samples; ++n) {
      double& value = scales[n * call.regions + r];
      value = sample_scale(normalize, value, weight, numel, static_cast<double>(samples));
      loss += value * sums[n * call.regions + r];
    }
    write_scalar(loss, call.wide, losses[r]);
  }
  call.wide ? write_scale<double>(scales, scale) : write_scale<float>(scales, scale);
}

static inline std::vector<double> values_of(const Tensor& t) {
  std::vector<double> out(static_cast<size_t>(t.numel()));
  generic::convert_to<double>(dtype_code(t.scalar_type()), t.const_data_ptr(), t.numel(), out.data());
  return out;
}

// coefficient [N, regions] = grad of the region * scale; a missing gradient counts as 0.
static inline std::vector<double> coefficients(const Tensor& scale,
                                               const std::vector<std::optional<Tensor>>& grads) {
  const size_t regions = grads.size();
  std::vector<double> out = values_of(scale);
  for (size_t r = 0; r < regions; ++r) {
    const double grad = grads[r].has_value() ? scalar_value(*grads[r]) : 0.0;
    for (size_t n = r; n < out.size(); n += regions) out[n] *= grad;
  }
  return out;
}

// Allocates the gradients asked for, runs the backward kernel; `elements` counts all gradients of the op.
static inline std::tuple<Tensor, Tensor> differentiate(PixelTensors& t, const Tensor& like,
                                                       ScalarType pred_dtype, ScalarType target_dtype,
                                                       bool need_pred, bool need_target, int64_t elements) {
  t.call.stream = elements * dtype_bytes(dtype_code(pred_dtype)) > kStreamBytes;
  auto make = [&](bool needed, ScalarType dtype) {
    return needed ? empty_output(like, t.size, t.channels_last, dtype) : empty_1d(like, 0, dtype);
  };
  Tensor grad_pred = make(need_pred, pred_dtype);
  Tensor grad_target = make(need_target, target_dtype);
  if (need_pred) t.call.grad_pred = grad_pred.mutable_data_ptr();
  if (need_target) t.call.grad_target = grad_target.mutable_data_ptr();
  join_segments(t.call.shape);
  if (t.call.shape.numel() > 0) run_units(t.call, kernels_for(t.call).backward);
  return {grad_pred, grad_target};
}

}  // namespace ik
