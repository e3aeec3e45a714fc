// Host side of the kernels over neighbouring pixels: tensors to kernel arguments, launches.
#pragma once

#include "cuda/arguments.cuh"
#include "cuda/pairs_backward.cuh"

namespace ik::cuda {

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

  Image image(const char* argument, void* data, ScalarType dtype) const {
    Image image{};
    image.data = static_cast<char*>(data);
    image.type = image_type(argument, dtype);
    const int64_t bytes = image.type == ElementType::f32 ? 4 : 2;
    image.pixel = bytes * (channels_last ? size[1] : 1);
    image.channel = bytes * (channels_last ? 1 : size[2] * size[3]);
    image.row = image.pixel * size[3];
    image.sample = bytes * size[1] * size[2] * size[3];
    // In channels_last vec4s are runs of elements if a thread has all the channels.
    const bool run = channels_last && size[1] == kernel_channels && size[1] > 1;
    image.vectors = frame.whole && (image.pixel == bytes || run) && is_aligned(data, kVec4 * bytes);
    image.interleaved = image.vectors && run;
    return image;
  }
  // The pair of a composite.
  ImagePair by_weight(const Image& pred, const Image& target) const {
    return mask.is_hole ? ImagePair{pred, target} : ImagePair{target, pred};
  }
  ImagePair inputs(const Tensor& pred, const Tensor* target) {
    const auto input = [&](const char* argument, const Tensor& tensor) {
      ready.push_back(in_layout(tensor, channels_last));
      // The kernels only read it.
      return image(argument, const_cast<void*>(ready.back().const_data_ptr()), tensor.scalar_type());
    };
    const Image first = input("pred", pred);
    return target == nullptr ? ImagePair{{}, first} : by_weight(first, input("target", *target));
  }

  // A gradient, or what stands for one that is not needed.
  Tensor output(const char* argument, const Tensor& like, bool needed, ScalarType dtype, Image& view) {
    if (!needed) return empty_1d(like, 0, dtype);
    Tensor tensor = empty_image(like, size, channels_last, dtype);
    view = image(argument, tensor.mutable_data_ptr(), dtype);
    return tensor;
  }

  int64_t sign_bytes(int kinds) const {
    return size[0] * size[1] * ceil_div(size[2], kVec4) * kinds * ceil_div(size[3], kVec4) * 4;
  }
  unsigned blocks() const { return grid_size(size[0] * frame.blocks.divisor, "pred"); }

 private:
  void set_mask(const Tensor& tensor) {
    ready.push_back(prepare_mask(tensor, size, channels_last, shape));
    mask.data = ready.back().const_data_ptr();
    mask.type = mask_type(tensor.scalar_type());
    mask.cap = mask_cap(tensor);
    // Several channels follow the layout of the images.
    const bool follows = channels_last && shape.mask_repeat == 1;
    mask.pixel = static_cast<int32_t>(follows ? size[1] : 1);
    mask.channel = follows ? 1 : shape.mask_stride_c;
    mask.row = static_cast<int32_t>(size[3] * mask.pixel);
    mask.sample = shape.mask_stride_n;
    mask.vectors = mask.type != ElementType::f64 && mask.pixel == 1 && size[3] % kVec4 == 0 &&
                   mask.channel % kVec4 == 0 && mask.sample % kVec4 == 0 &&
                   is_aligned(mask.data, kVec4 * static_cast<int64_t>(tensor.element_size()));
  }

  void set_frame() {
    const int64_t C = size[1];
    const int64_t H = size[2];
    const int64_t W = size[3];
    // Room for the rows and columns beside the image.
    constexpr int64_t kLargest = kMost - 1024;
    STD_TORCH_CHECK(C <= kLargest && H <= kLargest && C * W <= kLargest, "pred: a row is too large");
    const bool shared_mask = mask.data == nullptr || mask.channel == 0 || C == 1;
    kernel_channels = shared_mask && (C % 3 == 0 || C > 4) ? 3 : 1;
    frame.channels = static_cast<int32_t>(C);
    frame.rows = static_cast<int32_t>(H);
    frame.width = static_cast<int32_t>(W);
    frame.whole = W % kVec4 == 0;
    frame.sign_rows = static_cast<int32_t>(ceil_div(H, kVec4));
    frame.sign_vec4s = static_cast<int32_t>(ceil_div(W, kVec4));

    // The widest strips among those that leave the fewest threads idle.
    const auto strips = [&](int64_t lanes) { return ceil_div(frame.sign_vec4s, lanes); };
    frame.lanes = kWarp;
    for (int lanes : {16, 8}) {
      if (strips(lanes) * lanes < strips(frame.lanes) * frame.lanes) frame.lanes = lanes;
    }
    frame.log_lanes = log2_up(frame.lanes);
    frame.slots = kThreads / frame.lanes;
    // Longer chunks read fewer rows twice, more of them fill the GPU.
    const int64_t groups = ceil_div(C, kernel_channels);
    const auto slots = [&](int64_t rows) { return strips(frame.lanes) * groups * ceil_div(H, rows); };
    frame.chunk_rows = 32;
    while (frame.chunk_rows > kVec4 &&
           (frame.chunk_rows >= 2 * H || size[0] * slots(frame.chunk_rows) < 2048)) {
      frame.chunk_rows /= 2;
    }
    STD_TORCH_CHECK(slots(frame.chunk_rows) <= kMost - frame.slots, "pred: too many elements for one launch");
    frame.sample_slots = static_cast<int32_t>(slots(frame.chunk_rows));
    frame.strips = make_divider(strips(frame.lanes));
    frame.chunks = make_divider(ceil_div(H, frame.chunk_rows));
    frame.blocks = make_divider(ceil_div(frame.sample_slots, frame.slots));
  }
};

// What forward and backward of a call are given.
struct PairCall {
  const Tensor* pred;    // [N, C, H, W]; null in the backward of l1
  const Tensor* target;  // [N, C, H, W]; likewise, and of Terms::image
  const Tensor* mask;    // [H, W] or [N|1, C|1, H, W] or null
  Region region;
  bool mask_is_hole;
  bool square;
};

// Calls body(number of channels, whether squares are summed), both known at compile time.
template <Terms kTerms, typename Body>
void with_pair_kernel(int channels, bool square, const Body& body) {
  const auto with_channels = [&](auto count) {
    if constexpr (kTerms == Terms::losses) {
      body(count, std::false_type());
    } else {
      square ? body(count, std::true_type()) : body(count, std::false_type());
    }
  };
  channels == 3 ? with_channels(std::integral_constant<int, 3>())
                : with_channels(std::integral_constant<int, 1>());
}

// Returns the signs. One streaming kernel, then a small one that adds the sums. Outputs, weights and
// normalisations of `final` are set.
template <Terms kTerms>
Tensor run_pairs_forward(const DeviceScope& device, const PairCall& call, bool save_signs,
                         PairFinalArgs final) {
  const Tensor& pred = *call.pred;
  PairTensors t(sizes_of(pred), !pred.is_contiguous() && is_channels_last(pred), call.mask, call.region,
                call.mask_is_hole);
  Tensor signs = empty_1d(pred, save_signs ? t.sign_bytes(kSignKinds<kTerms>) : 0, ScalarType::Byte);
  std::optional<Tensor> partials;
  if (t.shape.numel() > 0) {
    PairForwardArgs args{};
    args.images = t.inputs(pred, call.target);
    args.sum_region = final.pair_normalize == PairNormalize::mask;
    args.frame = t.frame;
    args.mask = t.mask;
    if (save_signs) args.signs = static_cast<uint32_t*>(signs.mutable_data_ptr());
    const unsigned blocks = t.blocks();
    partials = empty_1d(pred, static_cast<int64_t>(blocks) * (kSums + 1), ScalarType::Float);
    args.partials = static_cast<PairPartial*>(partials->mutable_data_ptr());
    with_pair_kernel<kTerms>(t.kernel_channels, call.square, [&](auto channels, auto square) {
      launch(pairs_forward<kTerms, decltype(channels)::value, decltype(square)::value>, blocks, kThreads,
             device, args);
    });
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

// The gradients that are asked for.
struct PairGradients {
  const std::vector<int64_t>& size;
  bool channels_last;
  ScalarType pred_dtype;
  ScalarType target_dtype;
  bool need_pred;
  bool need_target;
};

// `args` brings the gradients that arrive and the scales; `signs` are those of l1.
template <Terms kTerms>
std::tuple<Tensor, Tensor> run_pairs_backward(const DeviceScope& device, const PairCall& call,
                                              const PairGradients& wanted, const Tensor* signs,
                                              const Tensor& like, PairBackwardArgs args) {
  PairTensors t(wanted.size, wanted.channels_last, call.mask, call.region, call.mask_is_hole);
  Image pred{};
  Image target{};
  Tensor grad_pred = t.output("pred", like, wanted.need_pred, wanted.pred_dtype, pred);
  Tensor grad_target = t.output("target", like, wanted.need_target, wanted.target_dtype, target);
  if (t.shape.numel() == 0 || !(wanted.need_pred || wanted.need_target)) return {grad_pred, grad_target};
  if (call.square) {
    STD_TORCH_CHECK(call.pred != nullptr && (kTerms == Terms::image || call.target != nullptr),
                    "the images are needed");
    args.images = t.inputs(*call.pred, kTerms == Terms::image ? nullptr : call.target);
  } else {
    STD_TORCH_CHECK(signs != nullptr && signs->numel() == t.sign_bytes(kSignKinds<kTerms>),
                    "signs: missing or of the wrong size");
    args.signs = static_cast<const uint32_t*>(signs->const_data_ptr());
  }
  args.grads = kTerms == Terms::image ? ImagePair{{}, pred} : t.by_weight(pred, target);
  args.frame = t.frame;
  args.mask = t.mask;
  with_pair_kernel<kTerms>(t.kernel_channels, call.square, [&](auto channels, auto square) {
    launch(pairs_backward<kTerms, decltype(channels)::value, decltype(square)::value>, t.blocks(), kThreads,
           device, args);
  });
  return {grad_pred, grad_target};
}

}  // namespace ik::cuda
