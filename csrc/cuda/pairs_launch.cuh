// Host side of the kernels over neighbouring pixels: tensors to kernel arguments, launches.
#pragma once

#include "cuda/arguments.cuh"
#include "cuda/pairs_backward.cuh"
#include "cuda/pixel_launch.cuh"

namespace ik::cuda {

inline ElementType element_type(const char* argument, ScalarType dtype) {
  ElementType found = ElementType::f32;
  with_dtype(argument, dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (std::is_same_v<T, Half>) found = ElementType::f16;
    if (std::is_same_v<T, BFloat16>) found = ElementType::bf16;
  });
  return found;
}

inline float* float_output(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// What forward and backward of one call share. `ready` keeps copies alive that a layout change made.
struct PairTensors {
  std::vector<int64_t> size;
  bool channels_last;
  PixelShape shape;
  MaskPlanes mask{};
  Frame frame{};
  int kernel_channels = 1;  // kChannels
  std::vector<Tensor> ready;

  PairTensors(const std::vector<int64_t>& image_size, bool is_channels_last, const Tensor* mask_tensor,
              Region region, bool mask_is_hole)
      : size(image_size), channels_last(is_channels_last), shape(pixel_shape(size, channels_last)) {
    mask.region = region;
    mask.is_hole = mask_is_hole;
    mask.sign = mask_is_hole ? 1.0f : -1.0f;
    mask.bias = mask_is_hole ? 0.0f : 1.0f;
    if (mask_tensor != nullptr) set_mask(*mask_tensor);
    if (shape.numel() > 0) set_frame();
  }

  template <typename Byte>
  Image<Byte> image(const char* argument, void* data, ScalarType dtype) const {
    Image<Byte> found{};
    found.data = static_cast<Byte*>(data);
    found.type = element_type(argument, dtype);
    const int64_t bytes = found.type == ElementType::f32 ? 4 : 2;
    found.pixel = bytes * (channels_last ? size[1] : 1);
    found.channel = bytes * (channels_last ? 1 : size[2] * size[3]);
    found.row = found.pixel * size[3];
    found.sample = bytes * size[1] * size[2] * size[3];
    // In channels_last quads are runs of elements if a thread has all the channels.
    const bool run = channels_last && size[1] == kernel_channels && size[1] > 1;
    found.vectors = frame.whole && (found.pixel == bytes || run) && is_aligned(data, kQuad * bytes);
    found.interleaved = found.vectors && run;
    return found;
  }
  // The pair of a composite.
  template <typename Byte>
  ImagePair<Byte> by_weight(const Image<Byte>& pred, const Image<Byte>& target) const {
    return mask.is_hole ? ImagePair<Byte>{pred, target} : ImagePair<Byte>{target, pred};
  }
  Image<const char> input(const char* argument, const Tensor& tensor) {
    ready.push_back(in_layout(tensor, channels_last));
    return image<const char>(argument, const_cast<void*>(ready.back().const_data_ptr()),
                             tensor.scalar_type());
  }
  ImagePair<const char> inputs(const Tensor& pred, const Tensor* target) {
    const Image<const char> image = input("pred", pred);
    return target == nullptr ? ImagePair<const char>{{}, image} : by_weight(image, input("target", *target));
  }

  // A gradient, or what stands for one that is not needed.
  Tensor output(const char* argument, const Tensor& like, bool needed, ScalarType dtype, Image<char>& view) {
    if (!needed) return empty_1d(like, 0, dtype);
    Tensor tensor = empty_image(like, size, channels_last, dtype);
    view = image<char>(argument, tensor.mutable_data_ptr(), dtype);
    return tensor;
  }

  int64_t sign_bytes(int kinds) const {
    return size[0] * size[1] * ((size[2] + kQuad - 1) / kQuad) * kinds * ((size[3] + kQuad - 1) / kQuad) * 4;
  }
  unsigned blocks() const {
    const int64_t count = size[0] * frame.blocks.divisor;
    STD_TORCH_CHECK(count <= std::numeric_limits<int32_t>::max(), "pred: too many elements for one launch");
    return static_cast<unsigned>(count);
  }

 private:
  void set_mask(const Tensor& tensor) {
    ready.push_back(prepare_mask(tensor, size, channels_last, shape));
    mask.data = ready.back().const_data_ptr();
    mask.type = mask_type(tensor.scalar_type());
    mask.cap = tensor.scalar_type() == ScalarType::Bool ? 1.0f : 255.0f;
    // Several channels follow the layout of the images.
    const bool follows = channels_last && shape.mask_repeat == 1;
    mask.pixel = static_cast<int32_t>(follows ? size[1] : 1);
    mask.channel = follows ? 1 : shape.mask_stride_c;
    mask.row = static_cast<int32_t>(size[3] * mask.pixel);
    mask.sample = shape.mask_stride_n;
    mask.vectors = mask.type != MaskType::f64 && mask.pixel == 1 && size[3] % kQuad == 0 &&
                   mask.channel % kQuad == 0 && mask.sample % kQuad == 0 &&
                   is_aligned(mask.data, kQuad * static_cast<int64_t>(tensor.element_size()));
  }

  void set_frame() {
    const int64_t C = size[1];
    const int64_t H = size[2];
    const int64_t W = size[3];
    // Room for the rows and columns beside the image.
    constexpr int64_t kLargest = std::numeric_limits<int32_t>::max() - 1024;
    STD_TORCH_CHECK(C <= kLargest && H <= kLargest && C * W <= kLargest, "pred: a row is too large");
    const bool shared_mask = mask.data == nullptr || mask.channel == 0 || C == 1;
    kernel_channels = shared_mask && (C % 3 == 0 || C > 4) ? 3 : 1;
    frame.channels = static_cast<int32_t>(C);
    frame.rows = static_cast<int32_t>(H);
    frame.width = static_cast<int32_t>(W);
    frame.whole = W % kQuad == 0;
    frame.sign_rows = static_cast<int32_t>((H + kQuad - 1) / kQuad);
    frame.sign_quads = static_cast<int32_t>((W + kQuad - 1) / kQuad);

    // The widest strips among those that leave the fewest threads idle.
    const auto strips = [&](int64_t lanes) { return (frame.sign_quads + lanes - 1) / lanes; };
    frame.lanes = kWarp;
    for (int lanes : {16, 8}) {
      if (strips(lanes) * lanes < strips(frame.lanes) * frame.lanes) frame.lanes = lanes;
    }
    while ((1 << frame.log_lanes) < frame.lanes) ++frame.log_lanes;
    frame.slots = kThreads / frame.lanes;
    // Longer chunks read fewer rows twice, more of them fill the GPU.
    const int64_t groups = (C + kernel_channels - 1) / kernel_channels;
    const auto slots = [&](int64_t rows) { return strips(frame.lanes) * groups * ((H + rows - 1) / rows); };
    frame.chunk_rows = 32;
    while (frame.chunk_rows > kQuad &&
           (frame.chunk_rows >= 2 * H || size[0] * slots(frame.chunk_rows) < 2048)) {
      frame.chunk_rows /= 2;
    }
    STD_TORCH_CHECK(slots(frame.chunk_rows) <= std::numeric_limits<int32_t>::max() - frame.slots,
                    "pred: too many elements for one launch");
    frame.sample_slots = static_cast<int32_t>(slots(frame.chunk_rows));
    frame.strips = make_divider(strips(frame.lanes));
    frame.chunks = make_divider((H + frame.chunk_rows - 1) / frame.chunk_rows);
    frame.blocks = make_divider((frame.sample_slots + frame.slots - 1) / frame.slots);
  }
};

struct PairForwardCall {
  const Tensor& pred;    // [N, C, H, W]
  const Tensor* target;  // [N, C, H, W], unless Terms::image
  const Tensor* mask;    // [H, W] or [N|1, C|1, H, W] or null
  Region region;
  bool mask_is_hole;
  bool square;
  bool save_signs;
  PairFinalArgs final;  // outputs, weights and normalisations are set
};

// Returns the signs. One streaming kernel, then a small one that adds the sums.
template <Terms kTerms>
Tensor run_pairs_forward(const DeviceScope& device, PairForwardCall call) {
  const auto sizes = call.pred.sizes();
  STD_TORCH_CHECK(sizes.size() == 4, "pred must have 4 dimensions (N, C, H, W)");
  PairTensors t({sizes.begin(), sizes.end()}, !call.pred.is_contiguous() && is_channels_last(call.pred),
                call.mask, call.region, call.mask_is_hole);
  Tensor signs =
      empty_1d(call.pred, call.save_signs ? t.sign_bytes(kSignKinds<kTerms>) : 0, ScalarType::Byte);
  std::optional<Tensor> partials;
  PairFinalArgs& final = call.final;
  if (t.shape.numel() > 0) {
    PairForwardArgs args{};
    args.images = t.inputs(call.pred, call.target);
    args.sum_region = final.pair_normalize == PairNormalize::mask;
    args.frame = t.frame;
    args.mask = t.mask;
    if (call.save_signs) args.signs = static_cast<uint32_t*>(signs.mutable_data_ptr());
    const unsigned blocks = t.blocks();
    partials = empty_1d(call.pred, static_cast<int64_t>(blocks) * (kSums + 1), ScalarType::Float);
    args.partials = static_cast<PairPartial*>(partials->mutable_data_ptr());
    const auto run = [&](auto kernel) { launch(kernel, blocks, kThreads, device, args); };
    const bool three = t.kernel_channels == 3;
    if constexpr (kTerms == Terms::losses) {
      three ? run(pairs_forward<kTerms, 3, false>) : run(pairs_forward<kTerms, 1, false>);
    } else if (call.square) {
      three ? run(pairs_forward<kTerms, 3, true>) : run(pairs_forward<kTerms, 1, true>);
    } else {
      three ? run(pairs_forward<kTerms, 3, false>) : run(pairs_forward<kTerms, 1, false>);
    }
    final.partials = args.partials;
    final.blocks = t.frame.blocks.divisor;
  }
  // Also for empty images: it writes the zeros.
  const auto [N, C, H, W] = std::array<int64_t, 4>{t.size[0], t.size[1], t.size[2], t.size[3]};
  final.samples = N;
  final.numel = static_cast<double>(t.shape.numel());
  final.pairs_down = static_cast<double>(N * C * (H > 0 ? H - 1 : 0) * W);
  final.pairs_across = static_cast<double>(N * C * H * (W > 0 ? W - 1 : 0));
  launch(pairs_finalize<kTerms == Terms::losses>, 1, kFinalThreads, device, final,
         finalize_lanes(final.samples, final.blocks));
  return signs;
}

struct PairBackwardCall {
  const Tensor& like;
  const Tensor* signs;
  const Tensor* mask;
  const Tensor* pred;  // [N, C, H, W], l2 only
  const Tensor* target;
  const std::vector<int64_t>& size;
  bool channels_last;
  ScalarType pred_dtype;
  ScalarType target_dtype;
  Region region;
  bool mask_is_hole;
  bool square;
  bool need_pred;
  bool need_target;
};

// `args` brings the gradients that arrive and the scales.
template <Terms kTerms>
std::tuple<Tensor, Tensor> run_pairs_backward(const DeviceScope& device, const PairBackwardCall& call,
                                              PairBackwardArgs args) {
  PairTensors t(call.size, call.channels_last, call.mask, call.region, call.mask_is_hole);
  Image<char> pred{};
  Image<char> target{};
  Tensor grad_pred = t.output("pred", call.like, call.need_pred, call.pred_dtype, pred);
  Tensor grad_target = t.output("target", call.like, call.need_target, call.target_dtype, target);
  if (t.shape.numel() == 0 || !(call.need_pred || call.need_target)) return {grad_pred, grad_target};
  if (call.square) {
    STD_TORCH_CHECK(call.pred != nullptr && (kTerms == Terms::image || call.target != nullptr),
                    "the images are needed");
    args.images = t.inputs(*call.pred, kTerms == Terms::image ? nullptr : call.target);
  } else {
    STD_TORCH_CHECK(call.signs != nullptr && call.signs->numel() == t.sign_bytes(kSignKinds<kTerms>),
                    "signs: missing or of the wrong size");
    args.signs = static_cast<const uint32_t*>(call.signs->const_data_ptr());
  }
  args.grads = kTerms == Terms::image ? ImagePair<char>{{}, pred} : t.by_weight(pred, target);
  args.frame = t.frame;
  args.mask = t.mask;
  const auto run = [&](auto kernel) { launch(kernel, t.blocks(), kThreads, device, args); };
  const bool three = t.kernel_channels == 3;
  if constexpr (kTerms == Terms::losses) {
    three ? run(pairs_backward<kTerms, 3, false>) : run(pairs_backward<kTerms, 1, false>);
  } else if (call.square) {
    three ? run(pairs_backward<kTerms, 3, true>) : run(pairs_backward<kTerms, 1, true>);
  } else {
    three ? run(pairs_backward<kTerms, 3, false>) : run(pairs_backward<kTerms, 1, false>);
  }
  return {grad_pred, grad_target};
}

}  // namespace ik::cuda
