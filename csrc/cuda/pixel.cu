// Host side of the pixel losses on CUDA: tensors to kernel arguments, dtype dispatch, launches. The kernels
// of masked_l1, hole_valid and feature_distance are compiled here, once.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>

#include "cuda/pixel_launch.cuh"

#include "cuda/pixel_backward.cuh"
#include "cuda/pixel_forward.cuh"

namespace ik::cuda {
namespace {

// Calls body(Type<P>(), Type<T>()) for two equal types, or for float32 and another one.
template <typename Body>
void with_pixel_types(ScalarType input, ScalarType target, const Body& body) {
  with_dtype("input", input, [&](auto p) {
    if (target == input) {
      body(p, p);
    } else if constexpr (std::is_same_v<decltype(p), Type<float>>) {
      with_dtype("target", target, [&](auto t) { body(p, t); });
    } else {
      body(p, Type<float>());
    }
  });
}

// A layer as the kernels see it; `kept` owns copies.
struct Layer {
  PixelLayer args{};
  PixelShape shape;  // of one batch, N samples
  ScalarType input_dtype = ScalarType::Float;
  ScalarType target_dtype = ScalarType::Float;
  std::vector<Tensor> kept;
  int64_t blocks = 0;  // 0 for a layer without elements
  double numel = 0.0;  // of the input
};

// Signs and sizes; what `set_images` and `set_tiling` fill in is missing.
Layer layer_of(const LayerTensors& tensors) {
  Layer layer;
  const std::vector<int64_t>& size = tensors.size;
  const int64_t N = tensors.batch;
  STD_TORCH_CHECK(size.size() == 4, "input must have 4 dimensions (N, C, H, W)");
  STD_TORCH_CHECK(N > 0 ? size[0] % N == 0 : size[0] == 0,
                  "input: its batch must be a multiple of the target's");
  layer.shape = pixel_shape({N, size[1], size[2], size[3]}, tensors.channels_last);
  layer.args.batch = static_cast<int32_t>(N);
  layer.args.predictions = N > 0 ? static_cast<int32_t>(size[0] / N) : 0;
  layer.args.batch_segments = N * layer.shape.segments;
  layer.numel = static_cast<double>(layer.args.predictions) * static_cast<double>(layer.shape.numel());
  return layer;
}

// Input and target in one layout; the input in `dtype`, which is wider than its own or equal. A
// half-precision target beside an input of the other half type is read in float32.
void set_images(Layer& layer, const LayerTensors& tensors, ScalarType dtype) {
  const ScalarType target = tensors.target->scalar_type();
  const bool two_halves = dtype != target && dtype != ScalarType::Float && target != ScalarType::Float;
  layer.input_dtype = dtype;
  layer.target_dtype = two_halves ? ScalarType::Float : target;
  const auto ready = [&](const Tensor& image, ScalarType wanted) {
    const Tensor typed = image.scalar_type() == wanted ? image : torch::stable::to(image, wanted);
    layer.kept.push_back(in_layout(typed, tensors.channels_last));
    return layer.kept.back().const_data_ptr();
  };
  layer.args.input = ready(*tensors.input, layer.input_dtype);
  layer.args.target = ready(*tensors.target, layer.target_dtype);
}

// Tiles, mask, signs, and whether whole vectors may be used; after the dtypes and images are known.
void set_tiling(Layer& layer, const LayerTensors& tensors) {
  PixelLayer& args = layer.args;
  const PixelShape& shape = layer.shape;
  const std::vector<int64_t>& size = tensors.size;
  const auto bytes = [](ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; };
  const int E = bytes(layer.input_dtype) == 4 || bytes(layer.target_dtype) == 4 ? 4 : 8;
  args.tiling = make_tiling(shape.samples, shape.segments, shape.length, E);
  layer.blocks = shape.samples * args.tiling.tiles_per_sample();
  args.aligned = shape.length % E == 0 && is_aligned(args.input, E * bytes(layer.input_dtype)) &&
                 is_aligned(args.target, E * bytes(layer.target_dtype));
  if (tensors.signs != nullptr) {
    const int64_t wanted = args.predictions * shape.sign_bytes();
    STD_TORCH_CHECK(tensors.signs->numel() == wanted, "signs: wrong size");
    // The backward only reads the signs.
    args.signs = static_cast<uint16_t*>(const_cast<void*>(tensors.signs->const_data_ptr()));
    args.sign_words = args.predictions * shape.samples * shape.segments * shape.groups();
    args.sign_words_allocated = wanted / 2;
  }
  MaskView& view = args.mask;
  view.repeat = 1;
  view.shared = !args.tiling.along;
  if (tensors.mask == nullptr) return;
  args.mask_per_prediction = tensors.mask->dim() == 4 && args.predictions > 1 &&
                             tensors.mask->sizes()[0] != 1 && tensors.mask->sizes()[0] == size[0];
  const int64_t samples = args.mask_per_prediction ? size[0] : tensors.batch;
  PixelShape with_mask = shape;
  const Tensor mask =
      prepare_mask(*tensors.mask, {samples, size[1], size[2], size[3]}, tensors.channels_last, with_mask);
  STD_TORCH_CHECK(with_mask.mask_repeat <= kMost, "mask: too many channels");
  layer.kept.push_back(mask);
  view.data = mask.const_data_ptr();
  view.stride_n = with_mask.mask_stride_n;
  view.stride_c = with_mask.mask_stride_c;
  view.repeat = static_cast<int32_t>(with_mask.mask_repeat);
  view.type = mask_type(mask.scalar_type());
  view.cap = mask_cap(mask);
  // A mask of every prediction serves the segments of one of them only.
  view.shared = view.shared && view.stride_c == 0 && !args.mask_per_prediction;
  view.aligned = view.type != ElementType::f64 && view.repeat == 1 && shape.length % E == 0 &&
                 view.stride_n % E == 0 && view.stride_c % E == 0 &&
                 is_aligned(view.data, E * static_cast<int64_t>(mask.element_size()));
}

// Calls run(args, indices, blocks) for each launch: of layers of the same dtypes.
template <typename Run>
void for_layers(const std::vector<Layer>& layers, PixelArgs args, const Run& run) {
  std::vector<size_t> waiting;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].blocks > 0) waiting.push_back(i);
  }
  const auto agree = [&](size_t a, size_t b) {
    return layers[a].input_dtype == layers[b].input_dtype && layers[a].target_dtype == layers[b].target_dtype;
  };
  for_launches(waiting, kMaxLayers, agree, [&](const std::vector<size_t>& chosen) {
    int64_t blocks = 0;
    args.count = 0;
    for (const size_t i : chosen) {
      PixelLayer& layer = args.layer[args.count++];
      layer = layers[i].args;
      layer.first_block = grid_size(blocks, "input");
      layer.blocks = static_cast<uint32_t>(layers[i].blocks);
      blocks += layers[i].blocks;
    }
    run(args, chosen, grid_size(blocks, "input"));
  });
}

}  // namespace

LayerTensors image_layer(const Tensor& input, const Tensor& target, const Tensor* mask) {
  STD_TORCH_CHECK(input.dim() == 4 && target.dim() == 4,
                  "input and target must have 4 dimensions (N, C, H, W)");
  const std::vector<int64_t> size = sizes_of(input);
  STD_TORCH_CHECK(std::equal(size.begin() + 1, size.end(), target.sizes().begin() + 1),
                  "target: C, H, W must be the input's");
  const bool channels_last = !input.is_contiguous() && is_channels_last(input);
  return {size, target.sizes()[0], channels_last, mask, &input, &target, nullptr};
}

template <int R>
PixelResult run_forward(const PixelCall& call, std::vector<LayerTensors> tensors,
                        const std::vector<double>& weights, Normalize normalize, bool save_signs,
                        Tensor& scale) {
  const DeviceScope device(scale);
  const bool l1 = call.penalty == Penalty::l1;
  STD_TORCH_CHECK(!save_signs || l1, "save_signs needs penalty l1");
  PixelResult result;
  result.signs.reserve(tensors.size());  // `given.signs` points into it
  std::vector<Layer> layers;
  for (LayerTensors& given : tensors) {
    layers.push_back(layer_of(given));
    Layer& layer = layers.back();
    const int64_t bytes = save_signs ? layer.args.predictions * layer.shape.sign_bytes() : 0;
    result.signs.push_back(empty_1d(scale, bytes, ScalarType::Byte));
    if (layer.numel == 0) continue;
    if (save_signs) given.signs = &result.signs.back();
    set_images(layer, given, given.input->scalar_type());
    set_tiling(layer, given);
  }
  PixelArgs args{};
  args.penalty = call.penalty;
  args.param = call.param;
  args.mask_is_hole = call.mask_is_hole;
  std::vector<const void*> sums(layers.size(), nullptr);
  std::vector<Tensor> partials;
  for_layers(layers, args, [&](PixelArgs& group, const std::vector<size_t>& chosen, unsigned blocks) {
    partials.push_back(empty_1d(scale, 2 * R * static_cast<int64_t>(blocks), ScalarType::Float));
    group.partials = partials.back().mutable_data_ptr();
    for (size_t k = 0; k < chosen.size(); ++k) {
      sums[chosen[k]] = static_cast<const Partial<R>*>(group.partials) + group.layer[k].first_block;
    }
    const Layer& first = layers[chosen[0]];
    with_pixel_types(first.input_dtype, first.target_dtype, [&](auto p, auto t) {
      using P = typename decltype(p)::type;
      using T = typename decltype(t)::type;
      launch(l1 ? pixel_forward<P, T, R, true> : pixel_forward<P, T, R, false>, blocks, kThreads, device,
             group);
    });
  });

  // Runs for empty images, too, because it writes the zeros.
  for (int r = 0; r < R; ++r) result.loss.push_back(empty_scalar(scale, ScalarType::Float));
  std::optional<Tensor> running;
  if (layers.size() > kMaxLayers) running = empty_1d(scale, 1, ScalarType::Double);
  FinalArgs final{};
  for (int r = 0; r < R; ++r) final.loss[r] = static_cast<float*>(result.loss[r].mutable_data_ptr());
  final.scale = static_cast<float*>(scale.mutable_data_ptr());
  final.samples = call.per_sample ? layers[0].shape.samples : 1;
  final.normalize = normalize;
  for (size_t first = 0; first < layers.size(); first += kMaxLayers) {
    final.count = 0;
    final.tiles = 0;
    for (size_t i = first; i < std::min(first + kMaxLayers, layers.size()); ++i) {
      const int64_t tiles = final.samples == 0 ? 0 : layers[i].blocks / final.samples;
      final.layer[final.count++] = {sums[i], tiles, weights[i], layers[i].numel};
      final.tiles = std::max(final.tiles, tiles);
    }
    if (running) {
      final.before = first == 0 ? nullptr : final.after;
      final.after = static_cast<double*>(running->mutable_data_ptr());
    }
    launch(pixel_finalize<R>, 1, kFinalThreads, device, final,
           finalize_lanes(final.count * final.samples, final.tiles));
    final.scale += final.count * final.samples * R;
  }
  return result;
}

template <int R>
void run_backward(const PixelCall& call, const std::vector<LayerTensors>& tensors,
                  const std::array<const Tensor*, R>& grad, const Tensor& scale) {
  const DeviceScope device(scale);
  const bool l1 = call.penalty == Penalty::l1;
  PixelArgs args{};
  for (int r = 0; r < R; ++r) {
    if (grad[r] != nullptr) args.grad[r] = float_data(*grad[r], "grad");
  }
  args.scale = float_data(scale, "scale");
  args.penalty = call.penalty;
  args.param = call.param;
  args.mask_is_hole = call.mask_is_hole;
  args.per_sample = call.per_sample;

  std::vector<Layer> layers;
  std::vector<std::pair<Tensor*, Tensor>> rounded;  // gradients computed in float32, for another dtype
  int64_t rows = 0;
  const auto add = [&](const LayerTensors& given) {
    Tensor* const outputs[2] = {given.grad_input, given.grad_target};
    Layer layer = layer_of(given);
    layer.args.scale_row = static_cast<int32_t>(rows);
    if (layer.numel == 0 || (outputs[0] == nullptr && outputs[1] == nullptr)) return;
    if (l1) {
      STD_TORCH_CHECK(given.signs != nullptr, "signs are needed");
      layer.input_dtype = (outputs[0] == nullptr ? outputs[1] : outputs[0])->scalar_type();
      layer.target_dtype = layer.input_dtype;
    } else {
      STD_TORCH_CHECK(given.input != nullptr && given.target != nullptr, "input and target are needed");
      set_images(layer, given, (outputs[0] == nullptr ? given.input : outputs[0])->scalar_type());
    }
    set_tiling(layer, given);
    if (outputs[0] != nullptr) layer.args.grad_input = outputs[0]->mutable_data_ptr();
    if (outputs[1] != nullptr && outputs[1]->scalar_type() == layer.target_dtype) {
      layer.args.grad_target = outputs[1]->mutable_data_ptr();
    } else if (outputs[1] != nullptr) {
      rounded.emplace_back(outputs[1],
                           empty_image(scale, given.size, given.channels_last, layer.target_dtype));
      layer.args.grad_target = rounded.back().second.mutable_data_ptr();
    }
    layers.push_back(std::move(layer));
  };
  for (const LayerTensors& given : tensors) {
    const bool both = given.grad_input != nullptr && given.grad_target != nullptr;
    if (l1 && both && given.grad_input->scalar_type() != given.grad_target->scalar_type()) {
      // Gradients of two dtypes are written in two passes: both passes read the signs and the mask alone.
      LayerTensors one = given;
      one.grad_target = nullptr;
      add(one);
      one.grad_target = given.grad_target;
      one.grad_input = nullptr;
      add(one);
    } else {
      add(given);
    }
    rows += call.per_sample ? given.batch : 1;
  }
  STD_TORCH_CHECK(scale.numel() == rows * R && scale.is_contiguous(),
                  "scale: expected a contiguous [rows, regions] tensor");
  for_layers(layers, args, [&](PixelArgs& group, const std::vector<size_t>& chosen, unsigned blocks) {
    const Layer& first = layers[chosen[0]];
    if (l1) {
      with_dtype("grad", first.input_dtype, [&](auto type) {
        using G = typename decltype(type)::type;
        launch(pixel_backward<G, G, R, true>, blocks, kThreads, device, group);
      });
      return;
    }
    with_pixel_types(first.input_dtype, first.target_dtype, [&](auto p, auto t) {
      launch(pixel_backward<typename decltype(p)::type, typename decltype(t)::type, R, false>, blocks,
             kThreads, device, group);
    });
  });
  for (auto& [gradient, value] : rounded) *gradient = torch::stable::to(value, gradient->scalar_type());
}

template <int R>
std::tuple<Tensor, Tensor> image_gradients(const PixelCall& call, LayerTensors tensors,
                                           const std::array<const Tensor*, R>& grad, const Tensor& scale,
                                           ScalarType pred_dtype, ScalarType target_dtype, bool need_pred,
                                           bool need_target) {
  const auto gradient = [&](bool needed, ScalarType dtype) {
    return needed ? empty_image(scale, tensors.size, tensors.channels_last, dtype)
                  : empty_1d(scale, 0, dtype);
  };
  Tensor grad_pred = gradient(need_pred, pred_dtype);
  Tensor grad_target = gradient(need_target, target_dtype);
  if (need_pred) tensors.grad_input = &grad_pred;
  if (need_target) tensors.grad_target = &grad_target;
  run_backward<R>(call, {tensors}, grad, scale);
  return {grad_pred, grad_target};
}

template PixelResult run_forward<1>(const PixelCall&, std::vector<LayerTensors>, const std::vector<double>&,
                                    Normalize, bool, Tensor&);
template PixelResult run_forward<2>(const PixelCall&, std::vector<LayerTensors>, const std::vector<double>&,
                                    Normalize, bool, Tensor&);
template void run_backward<1>(const PixelCall&, const std::vector<LayerTensors>&,
                              const std::array<const Tensor*, 1>&, const Tensor&);
template std::tuple<Tensor, Tensor> image_gradients<1>(const PixelCall&, LayerTensors,
                                                       const std::array<const Tensor*, 1>&, const Tensor&,
                                                       ScalarType, ScalarType, bool, bool);
template std::tuple<Tensor, Tensor> image_gradients<2>(const PixelCall&, LayerTensors,
                                                       const std::array<const Tensor*, 2>&, const Tensor&,
                                                       ScalarType, ScalarType, bool, bool);

}  // namespace ik::cuda
