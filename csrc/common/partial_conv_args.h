// Argument handling of partial convolution on the LibTorch stable ABI, shared by the CPU and CUDA
// registrations.
#pragma once

#include <string>
#include <vector>

#include "common/op_args.h"
#include "common/partial_conv.h"

namespace ik {

static inline MaskUpdate parse_update(const std::string& name) {
  return parse_name<MaskUpdate>("mask_update", name, {"clamp", "binary", "proportional"});
}

// As reference/partial_conv.py packs it.
static inline Finish parse_finish(int64_t how) {
  STD_TORCH_CHECK(how >= 0 && how < 12, "how: unknown value ", how);
  return {(how & 1) != 0, (how & 2) != 0, static_cast<Activation>(how >> 2)};
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

using Ints = std::vector<int64_t>;

// The windows of a convolution, as reference/partial_conv.py packs them: kernel, stride, padding and dilation
// with an entry for every spatial dimension, and the groups.
struct Windows {
  Ints kernel, stride, padding, dilation;
  int64_t groups;

  explicit Windows(const Ints& packed) {
    const int64_t dims = static_cast<int64_t>(packed.size()) / 4;
    STD_TORCH_CHECK((dims == 2 || dims == 3) && packed.size() % 4 == 1,
                    "windows must have 4 numbers for each of 2 or 3 dimensions, and the groups");
    const auto part = [&](int64_t i) {
      return Ints(packed.begin() + i * dims, packed.begin() + (i + 1) * dims);
    };
    kernel = part(0);
    stride = part(1);
    padding = part(2);
    dilation = part(3);
    groups = packed.back();
  }
};

static inline WindowShape window_shape(const Tensor& mask, const Windows& windows) {
  const int64_t dims = mask.dim() - 2;
  STD_TORCH_CHECK(static_cast<int64_t>(windows.kernel.size()) == dims,
                  "mask must have 4 or 5 dimensions, as many as the windows and 2 more");
  const int64_t channels = mask.size(1);
  STD_TORCH_CHECK(channels == 1 || (windows.groups > 0 && channels % windows.groups == 0), "mask has ",
                  channels, " channels for ", windows.groups, " groups");
  WindowShape shape;
  shape.samples = mask.size(0);
  shape.groups = channels == 1 ? 1 : windows.groups;
  shape.members = channels / shape.groups;
  shape.mask_stride[0] = mask.stride(0);
  shape.mask_stride[1] = mask.stride(1);
  for (int64_t i = 0; i < dims; ++i) {
    const size_t from = static_cast<size_t>(i);
    const int64_t to = i + 3 - dims;
    shape.mask_stride[2 + to] = mask.stride(2 + i);
    shape.size[to] = mask.size(2 + i);
    shape.kernel[to] = windows.kernel[from];
    shape.stride[to] = windows.stride[from];
    shape.padding[to] = windows.padding[from];
    shape.dilation[to] = windows.dilation[from];
    const int64_t room =
        shape.size[to] + 2 * shape.padding[to] - shape.dilation[to] * (shape.kernel[to] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "the windows are larger than the mask");
    shape.out_size[to] = room / shape.stride[to] + 1;
  }
  return shape;
}

// Planes [samples, groups, ...] of what the windows give, contiguous.
static inline Tensor empty_planes(const Tensor& mask, const WindowShape& shape, ScalarType dtype) {
  Ints size{shape.samples, shape.groups};
  size.insert(size.end(), shape.out_size + (5 - mask.dim()), shape.out_size + 3);
  return empty_strided(mask, size, dense_strides(size, false), dtype);
}

}  // namespace ik
