// partial_conv on CUDA: ratio and new mask of every window of a mask. One launch, two if channels are summed
// first.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/partial_conv_args.h"
#include "cuda/arguments.cuh"
#include "cuda/partial_conv_window.cuh"

namespace ik::cuda {
namespace {

// Calls body(Type<M>()); bool as uint8.
template <typename Body>
void with_mask_dtype(const Tensor& mask, const Body& body) {
  const ElementType type = mask_type(mask.scalar_type());
  if (type == ElementType::f64) return body(Type<double>());
  if (type == ElementType::u8) return body(Type<uint8_t>());
  with_dtype("mask", mask.scalar_type(), body);
}

// The mask summed over the channels of each group: [N, groups, D, H, W], contiguous.
Tensor sum_channels(const Tensor& mask, const WindowShape& shape, const DeviceScope& device) {
  ChannelSumArgs args{};
  args.pixels = shape.size[0] * shape.size[1] * shape.size[2];
  const int64_t planes = shape.samples * shape.groups;
  const int64_t channels = shape.groups * shape.members;
  Tensor out = empty_1d(mask, planes * args.pixels, ScalarType::Float);
  if (planes * args.pixels == 0) return out;
  STD_TORCH_CHECK(channels <= kMost && planes <= kMost && args.pixels <= kMost * kWarp,
                  "mask: too many elements for one launch");
  args.mask = mask.const_data_ptr();
  args.planes = static_cast<float*>(out.mutable_data_ptr());
  args.shape = shape;
  args.units = planes * args.pixels;
  args.groups = make_divider(shape.groups);
  args.cap = mask_cap(mask);
  const int64_t stride_n = shape.mask_stride[0];
  const int64_t stride_c = shape.mask_stride[1];
  bool planar = true;
  bool interleaved = stride_c == 1;
  int64_t dense = 1;
  for (int d = 2; d >= 0; --d) {
    if (shape.size[d] == 1) continue;
    planar = planar && shape.mask_stride[2 + d] == dense;
    interleaved = interleaved && shape.mask_stride[2 + d] == dense * channels;
    dense *= shape.size[d];
  }
  interleaved = interleaved && (shape.samples == 1 || stride_n == channels * args.pixels);
  with_mask_dtype(mask, [&](auto type) {
    using M = typename decltype(type)::type;
    constexpr int E = std::is_same_v<M, double> ? 1 : kMaskElements<M>;
    const bool aligned = is_aligned(args.mask, E * static_cast<int64_t>(sizeof(M)));
    if (interleaved && !(planar && args.pixels > 1)) {
      const bool vectors = aligned && shape.members % E == 0;
      args.log_lanes = std::min(log2_up(vectors ? shape.members / E : shape.members), 5);
      const int64_t units_of_block = (kWindowThreads >> args.log_lanes) * kSumUnroll;
      launch(vectors ? partial_conv_sum_interleaved<M, E> : partial_conv_sum_interleaved<M, 1>,
             grid_size(ceil_div(args.units, units_of_block), "mask"), kWindowThreads, device, args);
    } else {
      const bool vectors =
          aligned && planar && args.pixels % E == 0 && stride_n % E == 0 && stride_c % E == 0;
      const int64_t tiles = ceil_div(args.pixels, kWarp * (vectors ? E : 1));
      args.tiles = make_divider(tiles);
      launch(vectors ? partial_conv_sum_planar<M, E> : partial_conv_sum_planar<M, 1>,
             grid_size(planes * tiles, "mask"), kWindowThreads, device, args);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> window(const Tensor& mask,  // [N, C, H, W] or [N, C, D, H, W]
                                  int64_t multiplicity, const std::vector<int64_t>& windows, double numerator,
                                  const std::string& update, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float && on_device(mask),
                  "partial_conv: the cuda backend computes its planes in float32, of a mask on the GPU");
  const DeviceScope device(mask);
  const WindowShape shape = window_shape(mask, Windows(windows));
  Tensor ratio = empty_planes(mask, shape, ScalarType::Float);
  Tensor new_mask = empty_planes(mask, shape, ScalarType::Float);
  WindowArgs args{};
  args.shape = shape;
  args.update = parse_update(update);
  args.total = ratio.numel();
  if (args.total == 0) return {ratio, new_mask};
  args.ratio = float_output(ratio);
  args.new_mask = float_output(new_mask);
  args.numerator = static_cast<float>(numerator);
  args.cap = mask_cap(mask);
  const bool single = mask.size(1) == 1;
  args.multiplicity = single ? static_cast<float>(multiplicity) : 1.0f;
  args.window = static_cast<float>((single ? multiplicity : shape.members) * shape.kernel[0] *
                                   shape.kernel[1] * shape.kernel[2]);
  const unsigned blocks = static_cast<unsigned>(std::min(ceil_div(args.total, kWindowThreads), kMost));
  if (shape.members == 1) {
    args.mask = mask.const_data_ptr();
    with_mask_dtype(mask, [&](auto type) {
      launch(partial_conv_windows<typename decltype(type)::type>, blocks, kWindowThreads, device, args);
    });
    return {ratio, new_mask};
  }
  const Tensor planes = sum_channels(mask, shape, device);
  args.mask = planes.const_data_ptr();
  int64_t step = 1;
  for (int d = 4; d >= 0; --d) {
    args.shape.mask_stride[d] = step;
    step *= d > 1 ? shape.size[d - 2] : shape.groups;
  }
  launch(partial_conv_windows<float>, blocks, kWindowThreads, device, args);
  return {ratio, new_mask};
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("partial_conv_window_cuda", TORCH_BOX(&ik::cuda::window));
}
