// partial_conv on CUDA: the kernels around a library convolution.
//
//   mask_input       out = input * mask, 0 where the mask is 0
//   finish           out = the layer's result from the convolution's
//   finish_backward  out = gradient by the convolution's result; returns the one by the bias
//
// One launch each, two for the gradient by the bias. Windows: partial_conv_window.cu.
//
// Bytes per image element: its own, read and written once (backward with an activation: twice read), and the
// planes' divided by the channels that share them. Work split: partial_conv.cuh, partial_conv_window.cuh.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/partial_conv_args.h"
#include "cuda/arguments.cuh"
#include "cuda/partial_conv_any.cuh"
#include "cuda/partial_conv_vector.cuh"

namespace ik::cuda {
namespace {

// Two for each place on a large GPU: below, larger tiles would leave some of it idle.
constexpr int64_t kManyTiles = 2048;

// What one call works on, as its kernel is chosen.
struct Work {
  ImageArgs args{};
  Tensor out;
  int64_t samples;
  int64_t channels;
  int64_t vector;                 // elements of 16 bytes of `out`
  int64_t plane_channels = 1;     // that share a plane
  bool same = true;               // all images have one layout and one dtype
  bool aligned = true;            // every image starts at a multiple of 16 bytes
  bool mask_interleaved = false;  // several channels of it
  bool need_sums = false;
  std::optional<Tensor> partials =
      std::nullopt;  // of the sums, one row for each of the tiles that share channels

  int64_t numel() const { return samples * channels * args.pixels; }
};

ImageView view_of(const Tensor& image, const char* name) {
  STD_TORCH_CHECK(on_device(image), name, " must be on the GPU");
  return {image.const_data_ptr(), image_type(name, image.scalar_type()),
          dense_layout(image, name).interleaved};
}

Work make_work(const Tensor& source, const Tensor* output, const Tensor& out) {
  const DenseLayout layout = dense_layout(out, "out");
  STD_TORCH_CHECK(layout.channels <= kMost / 2 && out.size(0) <= kMost, "out: too many channels or samples");
  Work work{{}, out, out.size(0), layout.channels, 16 / static_cast<int64_t>(out.element_size())};
  ImageArgs& args = work.args;
  args.channels = static_cast<int32_t>(layout.channels);
  args.pixels = layout.pixels;
  args.out = out.mutable_data_ptr();
  const ImageView own = view_of(out, "out");
  args.out_type = own.type;
  args.out_interleaved = own.interleaved;
  work.aligned = is_aligned(args.out, 16);
  const auto add = [&](const Tensor& image, const char* name) {
    STD_TORCH_CHECK(same_sizes(image, out), name, " and out differ in shape");
    const ImageView view = view_of(image, name);
    work.same = work.same && view.type == own.type && view.interleaved == own.interleaved;
    work.aligned = work.aligned && is_aligned(view.data, 16);
    return view;
  };
  args.source = add(source, "source");
  if (output != nullptr) args.output = add(*output, "output");
  return work;
}

void set_planes(Work& work, const Tensor& planes, const char* name) {
  PlaneView& view = work.args.planes;
  const DenseLayout layout = dense_layout(planes, name);
  STD_TORCH_CHECK(on_device(planes) && layout.pixels == work.args.pixels && layout.channels > 0 &&
                      work.channels % layout.channels == 0 &&
                      (planes.size(0) == 1 || planes.size(0) == work.samples),
                  name, " does not fit the image");
  view.stride_n = planes.size(0) == 1 ? 0 : layout.channels * layout.pixels;
  view.stride_plane = layout.interleaved ? 1 : layout.pixels;
  view.stride_pixel = layout.interleaved ? layout.channels : 1;
  view.type = mask_type(planes.scalar_type());
  view.cap = mask_cap(planes);
  view.data = planes.const_data_ptr();
  work.plane_channels = work.channels / layout.channels;
  work.mask_interleaved = layout.interleaved;
}

void set_ratio(Work& work, const Tensor& ratio, const Tensor& new_mask) {
  float_data(ratio, "ratio");
  STD_TORCH_CHECK(same_sizes(ratio, new_mask) && ratio.is_contiguous() && new_mask.is_contiguous(),
                  "ratio and new_mask must be contiguous and of one shape");
  work.args.planes.new_mask = float_data(new_mask, "new_mask");
  if (work.numel() > 0) set_planes(work, ratio, "ratio");
}

// Where mask and images agree element by element, all elements become pixels of one channel.
void flatten(Work& work, bool mask_aligned) {
  ImageArgs& args = work.args;
  PlaneView& planes = args.planes;
  const bool shared = planes.stride_n == 0;
  const int64_t pixels = args.pixels * work.channels * (shared ? 1 : work.samples);
  if (!work.same || !work.aligned || !mask_aligned || work.plane_channels != 1 ||
      work.mask_interleaved != args.out_interleaved || pixels % work.vector != 0) {
    return;
  }
  args.pixels = pixels;
  args.channels = 1;
  args.out_interleaved = false;
  planes.stride_pixel = 1;
  work.channels = 1;
  if (!shared) work.samples = 1;
}

// After the sizes of a tile are known.
void launch_tiles(void (*kernel)(ImageArgs), int threads, Work& work, int64_t tile_pixels,
                  int64_t tile_channels, const DeviceScope& device) {
  ImageArgs& args = work.args;
  const int64_t along = ceil_div(args.pixels, tile_pixels);
  const int64_t across = ceil_div(work.channels, tile_channels);
  const unsigned blocks = grid_size(work.samples * along * across, "input");
  args.tiles_along = make_divider(along);
  args.tiles_across = make_divider(across);
  args.partial_rows = work.samples * along;
  if (work.need_sums) {
    work.partials = empty_1d(work.out, work.channels * args.partial_rows, ScalarType::Float);
    args.partials = float_output(*work.partials);
  }
  launch(kernel, blocks, static_cast<unsigned>(threads), device, args);
}

template <Part kPart, typename T>
void launch_planar(Work& work, const DeviceScope& device) {
  constexpr int U = kAtOnce<kPart>;
  ImageArgs& args = work.args;
  args.log_lanes = std::min(log2_up(ceil_div(args.pixels, work.vector)), log2_up(kThreads));
  args.lanes = 1 << args.log_lanes;
  args.rounds = 1;
  const int64_t tile_pixels = args.lanes * work.vector;
  const int64_t along = work.samples * ceil_div(args.pixels, tile_pixels);
  const auto channels = [&](int64_t rounds) { return (kThreads >> args.log_lanes) * U * rounds; };
  // More channels of a tile share its plane values, more tiles fill the GPU.
  while (2 * args.rounds * U <= kMaxSlots && channels(args.rounds) < work.channels &&
         along * ceil_div(work.channels, channels(2 * args.rounds)) >= kManyTiles) {
    args.rounds *= 2;
  }
  launch_tiles(partial_conv_planar<kPart, T>, kThreads, work, tile_pixels, channels(args.rounds), device);
}

template <Part kPart, typename T>
void launch_interleaved(Work& work, const DeviceScope& device) {
  constexpr int U = kAtOnce<kPart>;
  ImageArgs& args = work.args;
  const PlaneView& planes = args.planes;
  if (work.plane_channels == work.channels && (planes.stride_n == args.pixels || planes.data == nullptr)) {
    args.pixels *= work.samples;
    work.samples = 1;
  }
  const int64_t vectors = work.channels / work.vector;
  // Tiles across the channels of equal width.
  args.lanes = static_cast<int32_t>(ceil_div(vectors, ceil_div(vectors, kInterleavedThreads)));
  args.rounds = 1;
  const int64_t tile_channels = args.lanes * work.vector;
  const int64_t across = work.samples * ceil_div(work.channels, tile_channels);
  const auto pixels = [&](int64_t rounds) { return (kInterleavedThreads / args.lanes) * U * rounds; };
  while (args.rounds < 16 && pixels(args.rounds) < args.pixels &&
         across * ceil_div(args.pixels, pixels(2 * args.rounds)) >= kManyTiles) {
    args.rounds *= 2;
  }
  launch_tiles(partial_conv_interleaved<kPart, T>, kInterleavedThreads, work, pixels(args.rounds),
               tile_channels, device);
}

template <Part kPart>
void launch_any(Work& work, const DeviceScope& device) {
  ImageArgs& args = work.args;
  // 32 pixels by 32 channels, unless one of them has fewer.
  const int log_tile = log2_up(kAnyTile);
  args.log_lanes = std::min(log2_up(work.channels), 5);
  const int log_pixels = std::max(log2_up(args.pixels), log_tile - log2_up(kAnyChannels));
  if (log_pixels < log_tile - args.log_lanes) args.log_lanes = log_tile - log_pixels;
  args.lanes = 1 << args.log_lanes;
  launch_tiles(partial_conv_any<kPart>, kAnyThreads, work, kAnyTile / args.lanes, args.lanes, device);
}

template <Part kPart>
void launch_part(Work& work, const DeviceScope& device) {
  if (work.numel() == 0) return;
  ImageArgs& args = work.args;
  PlaneView& planes = args.planes;
  if constexpr (kPart == Part::mask) {
    const int64_t size = planes.type == ElementType::f32 ? 4 : planes.type == ElementType::u8 ? 1 : 2;
    const bool aligned = planes.data != nullptr && planes.type != ElementType::f64 &&
                         is_aligned(planes.data, work.vector * size);
    flatten(work, aligned);
    planes.aligned = aligned && args.pixels % work.vector == 0;
  }
  planes.channels = make_divider(work.plane_channels);
  const bool whole_planes =
      args.pixels % work.vector == 0 && planes.stride_pixel == 1 &&
      (kPart == Part::mask || (is_aligned(planes.data, 16) && is_aligned(planes.new_mask, 16)));
  const bool whole_channels = work.channels % work.vector == 0 && work.plane_channels % work.vector == 0;
  const bool vectors = work.same && work.aligned && (args.out_interleaved ? whole_channels : whole_planes);
  if (!vectors) return launch_any<kPart>(work, device);
  with_dtype("out", work.out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    args.out_interleaved ? launch_interleaved<kPart, T>(work, device) : launch_planar<kPart, T>(work, device);
  });
}

void mask_input(const Tensor& input,                // [N, C, ...]
                const std::optional<Tensor>& mask,  // [1|N, 1|C, ...]
                Tensor out) {                       // [N, C, ...]
  const DeviceScope device(out);
  Work work = make_work(input, nullptr, out);
  if (work.numel() == 0) return;
  if (mask) {
    set_planes(work, *mask, "mask");
  } else {
    work.args.planes.stride_pixel = 1;
    work.plane_channels = work.channels;
  }
  launch_part<Part::mask>(work, device);
}

void set_bias(Work& work, const Tensor& bias) {
  STD_TORCH_CHECK(on_device(bias) && bias.numel() == work.channels && bias.is_contiguous(),
                  "bias must be contiguous on the GPU, one value for each channel");
  work.args.bias = bias.const_data_ptr();
  work.args.bias_type = mask_type(bias.scalar_type());
}

void set_finish(Work& work, int64_t how, double slope) {
  work.args.how = parse_finish(how);
  // What scales the bias does not weigh it.
  work.args.how.weigh_bias = work.args.how.weigh_bias && !work.args.how.scale_bias;
  work.args.slope = static_cast<float>(slope);
}

void finish_raw(const Tensor& raw,       // [N, C, ...]
                const Tensor& ratio,     // [1|N, G, ...]
                const Tensor& new_mask,  // likewise
                const std::optional<Tensor>& bias, int64_t how, double slope, Tensor out) {
  const DeviceScope device(out);
  Work work = make_work(raw, nullptr, out);
  set_ratio(work, ratio, new_mask);
  std::optional<Tensor> ready;
  if (bias) {
    ready = torch::stable::contiguous(*bias);
    set_bias(work, *ready);
  }
  set_finish(work, how, slope);
  launch_part<Part::finish>(work, device);
}

Tensor finish_backward(const Tensor& grad,                   // [N, C, ...]
                       const std::optional<Tensor>& output,  // [N, C, ...]
                       const Tensor& ratio,                  // [1|N, G, ...]
                       const Tensor& new_mask,               // likewise
                       int64_t how, double slope, bool need_bias, Tensor out) {
  const DeviceScope device(out);
  const bool activated = parse_finish(how).activation != Activation::none;
  STD_TORCH_CHECK(!activated || output.has_value(), "output is needed with an activation");
  Work work = make_work(grad, activated ? &*output : nullptr, out);
  set_ratio(work, ratio, new_mask);
  set_finish(work, how, slope);
  Tensor bias_grad = empty_1d(out, need_bias ? work.channels : 0, ScalarType::Float);
  work.need_sums = need_bias;
  launch_part<Part::backward>(work, device);
  if (bias_grad.numel() > 0) {
    // Also for an empty batch: it writes the zeros.
    const float* sums = work.args.partials;
    const int64_t rows = sums == nullptr ? 0 : work.args.partial_rows;
    launch(total_of_parts<float>, grid_size(bias_grad.numel(), "bias"), kTotalThreads, device, sums, rows,
           float_output(bias_grad));
  }
  return bias_grad;
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("partial_conv_mask_input_cuda", TORCH_BOX(&ik::cuda::mask_input));
  m.impl("partial_conv_finish_cuda", TORCH_BOX(&ik::cuda::finish_raw));
  m.impl("partial_conv_finish_backward_cuda", TORCH_BOX(&ik::cuda::finish_backward));
}
