// Argument handling of the pixel losses on the LibTorch stable ABI, shared by the CPU and CUDA registrations.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/gram.h"
#include "common/pairs.h"
#include "common/pixel.h"
#include "common/pixel_shape.h"

namespace ik {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The value of an enum whose values are 0, 1, ... in the order of their names.
template <typename Enum>
Enum parse_name(const char* argument, const std::string& name, std::initializer_list<const char*> names) {
  const auto position = std::find(names.begin(), names.end(), name);
  STD_TORCH_CHECK(position != names.end(), argument, ": unknown value '", name, "'");
  return static_cast<Enum>(position - names.begin());
}

static inline Penalty parse_penalty(const std::string& name) {
  return parse_name<Penalty>("penalty", name, {"l1", "l2", "charbonnier", "huber"});
}

static inline Normalize parse_normalize(const std::string& name) {
  return parse_name<Normalize>("normalize", name, {"mask", "image", "sample"});
}

static inline Region parse_region(const std::string& name) {
  return parse_name<Region>("region", name, {"image", "hole", "dilated_hole", "first_pixel"});
}

static inline PairNormalize parse_pair_normalize(const std::string& name) {
  return parse_name<PairNormalize>("normalize", name, {"pairs", "image", "mask"});
}

static inline GramNormalize parse_gram_normalize(const std::string& name) {
  return parse_name<GramNormalize>("normalize", name, {"chw", "hw", "none", "gatys"});
}

static inline ScalarType accumulate_type(ScalarType a, ScalarType b) {
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The wider of two floating types.
static inline ScalarType wider_type(ScalarType a, ScalarType b) { return a == b ? a : accumulate_type(a, b); }

// `values` for `channels` channels, from none, one or all of them.
static inline std::vector<double> channel_constants(const std::vector<double>& values, double otherwise,
                                                    int64_t channels) {
  if (static_cast<int64_t>(values.size()) == channels) return values;
  STD_TORCH_CHECK(values.size() <= 1, "scale and shift need a value for every channel");
  return std::vector<double>(static_cast<size_t>(channels), values.empty() ? otherwise : values[0]);
}

// Strides of a dense tensor (N, C, ...): contiguous, or channels_last with the channels innermost.
static inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& size, bool channels_last) {
  std::vector<int64_t> strides(size.size(), 1);
  int64_t step = channels_last ? size[1] : 1;
  for (size_t dim = size.size(); dim-- > 0;) {
    if (channels_last && dim == 1) continue;
    strides[dim] = step;
    step *= size[dim];
  }
  return strides;
}

static inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// Same answer as Tensor.is_contiguous(memory_format=channels_last or channels_last_3d), which the stable ABI
// does not offer.
static inline bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const size_t dims = sizes.size();
  int64_t expected = 1;
  for (size_t i = 0; i < dims; ++i) {
    const size_t dim = i == 0 ? 1 : i + 1 == dims ? 0 : dims - i;
    if (sizes[dim] == 1) continue;
    if (strides[dim] != expected) return false;
    expected *= sizes[dim];
  }
  return true;
}

static inline bool has_layout(const Tensor& t, bool channels_last) {
  return channels_last ? is_channels_last(t) : t.is_contiguous();
}

static inline Tensor in_layout(const Tensor& t, bool channels_last) {
  if (has_layout(t, channels_last)) return t;
  const MemoryFormat last = t.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
  return torch::stable::contiguous(t, channels_last ? last : MemoryFormat::Contiguous);
}

// Allocation on `like`'s device through the C shim: 0.3 us where aten::empty by name costs 1 us.
static inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
                                   const std::vector<int64_t>& strides, ScalarType dtype) {
  int32_t device_type = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype_code, device_type, device_index,
                                                  &handle));
  return Tensor(handle);
}

static inline Tensor empty_1d(const Tensor& like, int64_t size, ScalarType dtype) {
  return empty_strided(like, {size}, {1}, dtype);
}

static inline Tensor empty_scalar(const Tensor& like, ScalarType dtype) {
  return empty_strided(like, {}, {}, dtype);
}

static inline Tensor empty_image(const Tensor& like, const std::vector<int64_t>& size, bool channels_last,
                                 ScalarType dtype) {
  return empty_strided(like, size, dense_strides(size, channels_last), dtype);
}

static inline PixelShape pixel_shape(const std::vector<int64_t>& size, bool channels_last) {
  STD_TORCH_CHECK(size.size() == 4, "pred must have 4 dimensions (N, C, H, W)");
  PixelShape shape;
  shape.samples = size[0];
  shape.channels = size[1];
  shape.segments = channels_last ? 1 : size[1];
  shape.pixels = size[2] * size[3];
  shape.length = shape.pixels * (channels_last ? size[1] : 1);
  return shape;
}

// Fills in the mask fields of `shape`; returns the mask without dimensions it was expanded along, copied only
// if its H x W plane is not dense.
static inline Tensor prepare_mask(const Tensor& mask, const std::vector<int64_t>& size, bool channels_last,
                                  PixelShape& shape) {
  const int64_t H = size[2];
  const int64_t W = size[3];
  const int64_t dims = mask.dim();
  STD_TORCH_CHECK(dims == 2 || dims == 4, "mask must have 2 or 4 dimensions");
  Tensor ready = mask;
  for (int64_t dim = 0; dims == 4 && dim < 2; ++dim) {
    if (ready.size(dim) > 1 && ready.stride(dim) == 0) ready = torch::stable::narrow(ready, dim, 0, 1);
  }
  const int64_t mask_n = dims == 2 ? 1 : ready.size(0);
  const int64_t mask_c = dims == 2 ? 1 : ready.size(1);
  STD_TORCH_CHECK(ready.size(dims - 2) == H && ready.size(dims - 1) == W &&
                      (mask_n == 1 || mask_n == size[0]) && (mask_c == 1 || mask_c == size[1]),
                  "mask does not broadcast to pred");
  // A single channel is a plane in both layouts; several follow the layout of pred.
  const bool interleaved = channels_last && mask_c > 1;
  const int64_t step = interleaved ? mask_c : 1;
  const bool dense = (W == 1 || ready.stride(dims - 1) == step) &&
                     (H == 1 || ready.stride(dims - 2) == W * step) && (!interleaved || ready.stride(1) == 1);
  if (!dense) {
    const auto format = interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
    ready = torch::stable::contiguous(ready, format);
  }
  shape.has_mask = true;
  shape.mask_stride_n = mask_n == 1 ? 0 : ready.stride(0);
  shape.mask_stride_c = mask_c == 1 || interleaved ? 0 : ready.stride(1);
  shape.mask_repeat = channels_last && mask_c == 1 ? size[1] : 1;
  shape.mask_multiplicity = mask_c == 1 ? size[1] : 1;
  return ready;
}

}  // namespace ik
