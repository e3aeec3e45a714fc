// Argument handling of partial convolution on the LibTorch stable ABI, shared by the CPU and CUDA
// registrations.
#pragma once

#include <string>
#include <vector>

#include "common/op_args.h"
#include "common/partial_conv.h"

namespace ik {

static inline MaskUpdate parse_update(const std::string& name) {
  if (name == "clamp") return MaskUpdate::clamp;
  if (name == "binary") return MaskUpdate::binary;
  STD_TORCH_CHECK(name == "proportional", "mask_update: unknown value '", name, "'");
  return MaskUpdate::proportional;
}

static inline Finish parse_finish(bool weigh_bias, bool scale_bias, const std::string& activation) {
  Finish how;
  how.weigh_bias = weigh_bias;
  how.scale_bias = scale_bias;
  if (activation == "relu") {
    how.activation = Activation::relu;
  } else if (activation == "leaky_relu") {
    how.activation = Activation::leaky_relu;
  } else {
    STD_TORCH_CHECK(activation == "none", "activation: unknown value '", activation, "'");
  }
  return how;
}

static inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

// A tensor (N, C, ...) as [N, C, pixels] or, interleaved, as [N, pixels, C]; contiguous where it is both.
struct DenseLayout {
  int64_t channels = 0;
  int64_t pixels = 1;
  bool interleaved = false;
};

static inline DenseLayout dense_layout(const Tensor& t, const char* name) {
  DenseLayout layout;
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(dims == 4 || dims == 5, name, " must have 4 or 5 dimensions");
  layout.channels = t.size(1);
  for (int64_t i = 2; i < dims; ++i) layout.pixels *= t.size(i);
  layout.interleaved = !t.is_contiguous();
  STD_TORCH_CHECK(!layout.interleaved || is_channels_last(t), name, " must be contiguous or channels_last");
  return layout;
}

// Windows over a mask [N, C, H, W] or [N, C, D, H, W]; sizes and strides as (depth, height, width).
struct WindowShape {
  int64_t samples = 0;
  int64_t groups = 1;   // planes
  int64_t members = 1;  // channels of a plane
  int64_t mask_stride[5] = {};
  int64_t size[3] = {1, 1, 1};
  int64_t out_size[3] = {1, 1, 1};
  int64_t kernel[3] = {1, 1, 1};
  int64_t stride[3] = {1, 1, 1};
  int64_t padding[3] = {0, 0, 0};
  int64_t dilation[3] = {1, 1, 1};
  std::vector<int64_t> out_sizes;  // of the planes, contiguous
  std::vector<int64_t> out_strides;
};

static inline WindowShape window_shape(const Tensor& mask, int64_t groups, const std::vector<int64_t>& kernel,
                                       const std::vector<int64_t>& stride,
                                       const std::vector<int64_t>& padding,
                                       const std::vector<int64_t>& dilation) {
  const int64_t dims = mask.dim() - 2;
  STD_TORCH_CHECK((dims == 2 || dims == 3) && static_cast<int64_t>(kernel.size()) == dims,
                  "mask must have 4 or 5 dimensions, as many as the windows and 2 more");
  const int64_t channels = mask.size(1);
  STD_TORCH_CHECK(channels == 1 || (groups > 0 && channels % groups == 0), "mask has ", channels,
                  " channels for ", groups, " groups");
  WindowShape shape;
  shape.samples = mask.size(0);
  shape.groups = channels == 1 ? 1 : groups;
  shape.members = channels / shape.groups;
  shape.mask_stride[0] = mask.stride(0);
  shape.mask_stride[1] = mask.stride(1);
  shape.out_sizes = {shape.samples, shape.groups};
  for (int64_t i = 0; i < dims; ++i) {
    const size_t from = static_cast<size_t>(i);
    const int64_t to = i + 3 - dims;
    shape.mask_stride[2 + to] = mask.stride(2 + i);
    shape.size[to] = mask.size(2 + i);
    shape.kernel[to] = kernel[from];
    shape.stride[to] = stride[from];
    shape.padding[to] = padding[from];
    shape.dilation[to] = dilation[from];
    const int64_t room = mask.size(2 + i) + 2 * padding[from] - dilation[from] * (kernel[from] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "the windows are larger than the mask");
    shape.out_size[to] = room / stride[from] + 1;
    shape.out_sizes.push_back(shape.out_size[to]);
  }
  shape.out_strides.assign(shape.out_sizes.size(), 1);
  for (size_t i = shape.out_sizes.size() - 1; i > 0; --i) {
    shape.out_strides[i - 1] = shape.out_strides[i] * shape.out_sizes[i];
  }
  return shape;
}

}  // namespace ik
