// From torch's tensors to what the kernels are called with, and back: what the CPU ops share.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/op_args.h"
#include "cpu/isa/convert.h"
#include "cpu/kernels.h"

namespace ik {

// Freed blocks of this size usually go back to the system (glibc maps those from 32 MiB on anew, and trims
// its heap), so that each step faults in all the pages of its outputs: for 64 MiB 25 to 40 ms, of a backward
// that computes for 18. With pages of 2 MiB the faults are 1/512 as many and the time is a quarter.
constexpr int64_t kLargeBlock = int64_t(4) << 20;

// Gradients of more bytes than this leave the cache anyway: written around it they spare the read for
// ownership.
constexpr int64_t kStreamBytes = int64_t(16) << 20;

// A thread takes at least this many elements: below it waking the second one costs more than it gives.
constexpr int64_t kGrainElements = 32768;

static inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kLargeBlock) return;
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  // Advice: where it is refused, pages stay small.
  if (end > first) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// An image that is about to be written in full.
static inline Tensor empty_output(const Tensor& like, const std::vector<int64_t>& size, bool channels_last,
                                  ScalarType dtype) {
  Tensor out = empty_image(like, size, channels_last, dtype);
  ask_for_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

static inline Dtype dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    default:
      STD_TORCH_CHECK(type == ScalarType::Bool, "dtype of a tensor: floating or bool expected");
      return Dtype::boolean;
  }
}

static inline std::vector<double> values_of(const Tensor& t) {
  std::vector<double> out(static_cast<size_t>(t.numel()));
  generic::convert_to(dtype_code(t.scalar_type()), t.const_data_ptr(), t.numel(), out.data());
  return out;
}

static inline double scalar_value(const Tensor& t) { return values_of(t)[0]; }

// A missing gradient counts as 0.
static inline double scalar_value(const std::optional<Tensor>& t) {
  return t.has_value() ? scalar_value(*t) : 0;
}

// A contiguous tensor of these values.
static inline Tensor make_tensor(const Tensor& like, const std::vector<double>& values,
                                 const std::vector<int64_t>& size, ScalarType dtype) {
  Tensor out = empty_strided(like, size, dense_strides(size, false), dtype);
  generic::convert_from(dtype_code(dtype), values.data(), out.numel(), out.mutable_data_ptr());
  return out;
}

static inline Tensor make_scalar(const Tensor& like, double value, ScalarType dtype) {
  return make_tensor(like, {value}, {}, dtype);
}

// float64 if one layer is.
static inline ScalarType accumulate_type(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  ScalarType dtype = ScalarType::Float;
  for (size_t i = 0; i < a.size(); ++i) {
    if (accumulate_type(a[i].scalar_type(), b[i].scalar_type()) == ScalarType::Double)
      dtype = ScalarType::Double;
  }
  return dtype;
}

// Runs `kernel` over all units of `call`, at least `grain` of them a thread.
template <typename Call>
static inline void run_units(const Call& call, Kernel<Call> kernel, int64_t units, int64_t grain) {
  if (units == 0) return;
  if (units <= grain) return kernel(call, 0, units);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

// What is known of the images without their data.
struct ImageKind {
  std::vector<int64_t> size;  // N, C, H, W of pred
  bool channels_last;
  ScalarType pred, target;  // dtypes

  static ImageKind of(const Tensor& pred, const Tensor& target) {
    return {sizes_of(pred), !pred.is_contiguous() && is_channels_last(pred), pred.scalar_type(),
            target.scalar_type()};
  }
};

// A call and the tensors it points into; `ready` keeps copies alive that a layout change made.
template <typename Call>
struct ImageTensors {
  ImageKind kind;
  Call call;
  ScalarType dtype;  // of losses and sums
  std::vector<Tensor> ready;

  explicit ImageTensors(const ImageKind& images)
      : kind(images), dtype(accumulate_type(images.pred, images.target)) {
    call.shape = pixel_shape(kind.size, kind.channels_last);
    call.pred_dtype = dtype_code(kind.pred);
    call.target_dtype = dtype_code(kind.target);
    call.wide = dtype == ScalarType::Double;
  }

  const void* add(const Tensor& image) {
    ready.push_back(in_layout(image, kind.channels_last));
    return ready.back().const_data_ptr();
  }

  void set_images(const std::optional<Tensor>& pred, const std::optional<Tensor>& target) {
    if (pred.has_value()) call.pred = add(*pred);
    if (target.has_value()) call.target = add(*target);
  }

  // `size`: what the mask broadcasts to.
  void set_mask(const Tensor& mask, const std::vector<int64_t>& size) {
    call.mask_dtype = dtype_code(mask.scalar_type());
    ready.push_back(prepare_mask(mask, size, kind.channels_last, call.shape));
    call.mask = ready.back().const_data_ptr();
  }

  // Packed signs: `used` of the `sign_bytes` are written by the kernel. Behind them `tail_bytes` for the mask, so
  // that the backward need not read it again: a byte that is 1 if it holds zeros and ones alone, and then, if it
  // `packs`, the mask as bits.
  Tensor make_signs(const Tensor& like, int64_t used, int64_t sign_bytes, int64_t tail_bytes, bool packs) {
    Tensor signs = empty_1d(like, sign_bytes + tail_bytes, ScalarType::Byte);
    call.signs = static_cast<uint8_t*>(signs.mutable_data_ptr());
    // An output left unwritten in part would differ between runs.
    std::fill(call.signs + used, call.signs + signs.numel(), uint8_t(0));
    if (tail_bytes > 0) {
      call.binary = call.signs + sign_bytes;
      *call.binary = 1;
      call.mask_bits = packs ? call.binary + 1 : nullptr;
    }
    return signs;
  }

  void run(Kernel<Call> kernel) {
    const int64_t elements = call.shape.numel() / std::max<int64_t>(call.units(), 1);
    run_units(call, kernel, call.units(), kGrainElements / std::max<int64_t>(elements, 1) + 1);
  }

  // Allocates the gradients that are wanted and runs `kernel`; `elements` counts all gradients of the op.
  std::tuple<Tensor, Tensor> differentiate(const Tensor& like, bool need_pred, bool need_target,
                                           Kernel<Call> kernel, int64_t elements) {
    const auto make = [&](bool needed, ScalarType type, void*& data) {
      if (!needed) return empty_1d(like, 0, type);
      Tensor out = empty_output(like, kind.size, kind.channels_last, type);
      data = out.mutable_data_ptr();
      return out;
    };
    Tensor grad_pred = make(need_pred, kind.pred, call.grad_pred);
    Tensor grad_target = make(need_target, kind.target, call.grad_target);
    call.stream = elements * dtype_bytes(dtype_code(kind.pred)) > kStreamBytes;
    run(kernel);
    return {grad_pred, grad_target};
  }
};

}  // namespace ik
