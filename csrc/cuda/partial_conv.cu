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
#include "cuda/partial_conv_any.cuh"
#include "cuda/partial_conv_launch.cuh"
#include "cuda/partial_conv_vector.cuh"

namespace ik::cuda {
namespace {

// Two for each place on a large GPU: below, larger tiles would leave some of it idle.
constexpr int64_t kManyTiles = 2048;

// What one call works on, as its kernel is chosen.
struct Work {
  ImageArgs args{};
  ScalarType dtype = ScalarType::Float;  // of `out`
  int64_t samples = 0;
  int64_t channels = 0;
  int64_t plane_channels = 1;     // that share a plane
  bool same = true;               // all images have one layout and one dtype
  bool aligned = true;            // every image starts at a multiple of 16 bytes
  bool mask_interleaved = false;  // several channels of it
  int64_t numel() const { return samples * channels * args.pixels; }
};

MaskType image_type(const Tensor& image, const char* name) {
  const ScalarType dtype = image.scalar_type();
  STD_TORCH_CHECK(on_device(image) && (dtype == ScalarType::Float || dtype == ScalarType::Half ||
                                       dtype == ScalarType::BFloat16),
                  name, ": the cuda backend takes float16, bfloat16 and float32 on the GPU");
  return mask_type(dtype);
}

Work make_work(const Tensor& source, const Tensor* output, const Tensor& out) {
  Work work;
  const DenseLayout layout = dense_layout(out, "out");
  STD_TORCH_CHECK(layout.channels <= kMost / 2 && out.size(0) <= kMost, "out: too many channels or samples");
  ImageArgs& args = work.args;
  work.samples = out.size(0);
  work.channels = layout.channels;
  work.dtype = out.scalar_type();
  args.channels = static_cast<int32_t>(layout.channels);
  args.pixels = layout.pixels;
  args.out = out.mutable_data_ptr();
  args.out_type = image_type(out, "out");
  args.out_interleaved = layout.interleaved;
  work.aligned = is_aligned(args.out, 16);
  const auto add = [&](const Tensor& image, const char* name, const void*& data, MaskType& type,
                       bool& interleaved) {
    STD_TORCH_CHECK(same_sizes(image, out), name, " and out differ in shape");
    data = image.const_data_ptr();
    type = image_type(image, name);
    interleaved = dense_layout(image, name).interleaved;
    work.same = work.same && type == args.out_type && interleaved == args.out_interleaved;
    work.aligned = work.aligned && is_aligned(data, 16);
  };
  add(source, "source", args.source, args.source_type, args.source_interleaved);
  if (output != nullptr) add(*output, "output", args.output, args.output_type, args.output_interleaved);
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

// Number of blocks, after the sizes of a tile are known.
unsigned set_grid(Work& work, int64_t tile_pixels, int64_t tile_channels) {
  ImageArgs& args = work.args;
  const int64_t along = up(args.pixels, tile_pixels);
  const int64_t across = up(work.channels, tile_channels);
  const unsigned blocks = checked_grid(work.samples * along * across, "input");
  args.tiles_along = make_divider(along);
  args.tiles_across = make_divider(across);
  args.partial_rows = work.samples * along;
  return blocks;
}

// The sums of the backward, one row for each of the tiles that share channels.
void set_partials(Work& work, std::optional<Tensor>* partials, const Tensor& like) {
  if (partials == nullptr) return;
  *partials = empty_1d(like, work.channels * work.args.partial_rows, ScalarType::Float);
  work.args.partials = static_cast<float*>((*partials)->mutable_data_ptr());
}

template <typename T>
constexpr int kVectorOf = 16 / static_cast<int>(sizeof(T));

// Mask and images agree element by element: the channels count as pixels.
bool flatten(Work& work) {
  ImageArgs& args = work.args;
  const PlaneView& planes = args.planes;
  if (!work.same || work.plane_channels != 1 || planes.data == nullptr || planes.type == MaskType::f64 ||
      work.mask_interleaved != args.out_interleaved) {
    return false;
  }
  const bool shared = planes.stride_n == 0;
  const int64_t pixels = args.pixels * work.channels * (shared ? 1 : work.samples);
  const int64_t size = args.planes.type == MaskType::f32 ? 4 : args.planes.type == MaskType::u8 ? 1 : 2;
  const int64_t E = work.dtype == ScalarType::Float ? 4 : 8;
  if (!work.aligned || pixels % E != 0 || !is_aligned(planes.data, E * size)) return false;
  args.pixels = pixels;
  args.channels = 1;
  work.channels = 1;
  if (!shared) work.samples = 1;
  return true;
}

template <Part kPart, typename T>
void launch_planar(Work& work, std::optional<Tensor>* partials, const Tensor& like,
                   const DeviceScope& device) {
  constexpr int U = kAtOnce<kPart>;
  ImageArgs& args = work.args;
  args.log_lanes = std::min(log2_up(up(args.pixels, kVectorOf<T>)), log2_up(kThreads));
  args.lanes = 1 << args.log_lanes;
  args.rounds = 1;
  const int64_t tile_pixels = static_cast<int64_t>(args.lanes) * kVectorOf<T>;
  const auto channels = [&](int64_t rounds) { return (kThreads >> args.log_lanes) * U * rounds; };
  // More channels of a tile share its plane values, more tiles fill the GPU.
  while (2 * args.rounds * U <= kMaxSlots && channels(args.rounds) < work.channels &&
         work.samples * up(args.pixels, tile_pixels) * up(work.channels, channels(2 * args.rounds)) >=
             kManyTiles) {
    args.rounds *= 2;
  }
  const unsigned blocks = set_grid(work, tile_pixels, channels(args.rounds));
  set_partials(work, partials, like);
  launch(partial_conv_planar<kPart, T>, blocks, kThreads, device, args);
}

template <Part kPart, typename T>
void launch_interleaved(Work& work, std::optional<Tensor>* partials, const Tensor& like,
                        const DeviceScope& device) {
  constexpr int U = kAtOnce<kPart>;
  ImageArgs& args = work.args;
  const PlaneView& planes = args.planes;
  if (work.plane_channels == work.channels && (planes.stride_n == args.pixels || planes.data == nullptr)) {
    args.pixels *= work.samples;
    work.samples = 1;
  }
  const int64_t vectors = work.channels / kVectorOf<T>;
  // Tiles across the channels of equal width.
  args.lanes = static_cast<int32_t>(up(vectors, up(vectors, kInterleavedThreads)));
  args.rounds = 1;
  const int64_t tile_channels = static_cast<int64_t>(args.lanes) * kVectorOf<T>;
  const auto pixels = [&](int64_t rounds) { return (kInterleavedThreads / args.lanes) * U * rounds; };
  while (args.rounds < 16 && pixels(args.rounds) < args.pixels &&
         work.samples * up(args.pixels, pixels(2 * args.rounds)) * up(work.channels, tile_channels) >=
             kManyTiles) {
    args.rounds *= 2;
  }
  const unsigned blocks = set_grid(work, pixels(args.rounds), tile_channels);
  set_partials(work, partials, like);
  launch(partial_conv_interleaved<kPart, T>, blocks, kInterleavedThreads, device, args);
}

template <Part kPart>
void launch_any(Work& work, std::optional<Tensor>* partials, const Tensor& like, const DeviceScope& device) {
  ImageArgs& args = work.args;
  // 32 pixels by 32 channels, unless one of them has fewer.
  const int log_tile = log2_up(kAnyTile);
  args.log_lanes = std::min(log2_up(work.channels), 5);
  const int log_pixels = std::max(log2_up(args.pixels), log_tile - log2_up(kAnyChannels));
  if (log_pixels < log_tile - args.log_lanes) args.log_lanes = log_tile - log_pixels;
  args.lanes = 1 << args.log_lanes;
  const unsigned blocks = set_grid(work, kAnyTile / args.lanes, args.lanes);
  set_partials(work, partials, like);
  launch(partial_conv_any<kPart>, blocks, kAnyThreads, device, args);
}

template <Part kPart>
void launch_part(Work& work, std::optional<Tensor>* partials, const Tensor& like, const DeviceScope& device) {
  if (work.numel() == 0) return;
  ImageArgs& args = work.args;
  if constexpr (kPart == Part::mask) {
    if (flatten(work)) {
      const int64_t E = work.dtype == ScalarType::Float ? 4 : 8;
      const unsigned blocks = set_grid(work, kFlatUnroll * kThreads * E, 1);
      with_dtype("out", work.dtype, [&](auto type) {
        launch(partial_conv_flat<typename decltype(type)::type>, blocks, kThreads, device, args);
      });
      return;
    }
  }
  args.planes.channels = make_divider(work.plane_channels);
  with_dtype("out", work.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t E = kVectorOf<T>;
    const PlaneView& planes = args.planes;
    const bool vectors = work.same && work.aligned;
    const bool whole_planes =
        args.pixels % E == 0 && planes.stride_pixel == 1 &&
        (kPart == Part::mask || (is_aligned(planes.data, 16) && is_aligned(planes.new_mask, 16)));
    const bool whole_channels = work.channels % E == 0 && (work.plane_channels % E == 0);
    if (vectors && !args.out_interleaved && whole_planes) {
      launch_planar<kPart, T>(work, partials, like, device);
    } else if (vectors && args.out_interleaved && whole_channels) {
      launch_interleaved<kPart, T>(work, partials, like, device);
    } else {
      launch_any<kPart>(work, partials, like, device);
    }
  });
}

void mask_input(const Tensor& input,                // [N, C, ...]
                const std::optional<Tensor>& mask,  // [1|N, 1|C, ...]
                Tensor out) {                       // [N, C, ...]
  const DeviceScope device(out);
  Work work = make_work(input, nullptr, out);
  if (work.numel() == 0) return;
  PlaneView& planes = work.args.planes;
  if (mask) {
    set_planes(work, *mask, "mask");
    const int64_t E = work.dtype == ScalarType::Float ? 4 : 8;
    planes.aligned = planes.type != MaskType::f64 && work.args.pixels % E == 0 &&
                     is_aligned(planes.data, E * static_cast<int64_t>(mask->element_size()));
  } else {
    planes.type = MaskType::none;
    planes.stride_pixel = 1;
    work.plane_channels = work.channels;
  }
  launch_part<Part::mask>(work, nullptr, out, device);
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
  launch_part<Part::finish>(work, nullptr, out, device);
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
  std::optional<Tensor> partials;
  launch_part<Part::backward>(work, need_bias ? &partials : nullptr, out, device);
  if (bias_grad.numel() > 0) {
    // Also for an empty batch: it writes the zeros.
    const float* sums = partials ? static_cast<const float*>(partials->const_data_ptr()) : nullptr;
    const int64_t rows = partials ? work.args.partial_rows : 0;
    launch(partial_conv_bias_total, checked_grid(bias_grad.numel(), "bias"), kAnyThreads, device, sums, rows,
           static_cast<float*>(bias_grad.mutable_data_ptr()));
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
