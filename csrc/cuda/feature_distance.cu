// feature_distance on CUDA: masked distance of feature maps, summed over layers, k predictions against one
// target.
//
//   forward   loss = sum_l scale_l sum w penalty(input_l - target_l), scale_l = weight_l / D_l
//   backward  d loss / d input_l = grad scale_l w penalty'(d); the caller sums it for the target
//
// Saved for backward: scale and, for l1, the signs of d (2 bits an element); the other penalties need input
// and target. Up to 8 layers of one dtype: two launches forward, one backward. Work split and bytes:
// feature_distance.cuh. Layers whose target has another dtype than their input are read in float32, the
// narrower one through a copy.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cuda/feature_distance.cuh"
#include "cuda/pixel_launch.cuh"

namespace ik::cuda {
namespace {

// A layer's tensors as one launch sees them; `kept` owns copies.
struct Layer {
  FeatureLayer args{};
  PixelShape shape;  // of one batch, N samples
  ScalarType dtype = ScalarType::Float;
  std::vector<Tensor> kept;
  int64_t blocks = 0;
};

// sizes: kN, C, H, W, N
Layer layer_shape(const std::vector<int64_t>& sizes, bool channels_last) {
  Layer layer;
  const int64_t N = sizes[4];
  STD_TORCH_CHECK(N > 0 ? sizes[0] % N == 0 : sizes[0] == 0,
                  "input: its batch must be a multiple of the target's");
  layer.shape = pixel_shape({N, sizes[1], sizes[2], sizes[3]}, channels_last);
  layer.args.batch = static_cast<int32_t>(N);
  layer.args.predictions = N > 0 ? static_cast<int32_t>(sizes[0] / N) : 0;
  layer.args.batch_segments = N * layer.shape.segments;
  return layer;
}

// Tiles for vectors of `elements`, and the mask; `mask` may be null.
void set_tiling(Layer& layer, const std::vector<int64_t>& sizes, const Tensor* mask, bool channels_last,
                int elements) {
  FeatureLayer& args = layer.args;
  const PixelShape& shape = layer.shape;
  args.tiling = make_tiling(shape.samples, shape.segments, shape.length, elements);
  layer.blocks = grid_size(args.tiling, shape.samples);
  if (mask == nullptr) {
    args.mask = mask_view(nullptr, shape, args.tiling, elements);
    return;
  }
  args.mask_per_prediction =
      mask->dim() == 4 && args.predictions > 1 && mask->sizes()[0] != 1 && mask->sizes()[0] == sizes[0];
  const int64_t samples = args.mask_per_prediction ? sizes[0] : sizes[4];
  PixelShape with_mask = shape;
  layer.kept.push_back(
      prepare_mask(*mask, {samples, sizes[1], sizes[2], sizes[3]}, channels_last, with_mask));
  args.mask = mask_view(&layer.kept.back(), with_mask, args.tiling, elements);
  // One mask value then serves the segments of one prediction only.
  if (args.mask_per_prediction) args.mask.shared = false;
}

// Input and target in one layout and in dtype `wanted`, or in float32 if one of them has another dtype.
void set_images(Layer& layer, const Tensor& input, const Tensor& target, ScalarType wanted,
                bool channels_last) {
  const bool same = input.scalar_type() == wanted && target.scalar_type() == wanted;
  layer.dtype = same ? wanted : ScalarType::Float;
  for (const Tensor* image : {&input, &target}) {
    const Tensor typed =
        image->scalar_type() == layer.dtype ? *image : torch::stable::to(*image, layer.dtype);
    layer.kept.push_back(in_layout(typed, channels_last));
  }
  layer.args.input = layer.kept[0].const_data_ptr();
  layer.args.target = layer.kept[1].const_data_ptr();
}

int elements_of(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 8; }

std::vector<int64_t> layer_sizes(const Tensor& input, const Tensor& target) {
  STD_TORCH_CHECK(input.dim() == 4 && target.dim() == 4,
                  "input and target must have 4 dimensions (N, C, H, W)");
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  STD_TORCH_CHECK(std::equal(sizes.begin() + 1, sizes.end(), target.sizes().begin() + 1),
                  "target: C, H, W must be the input's");
  sizes.push_back(target.sizes()[0]);
  return sizes;
}

// Calls run(args, indices, blocks) for groups of layers with equal keys, at most kMaxLayers each.
template <typename Key, typename Run>
void for_groups(const std::vector<Layer>& layers, const Key& key, FeatureArgs args, const Run& run) {
  std::vector<size_t> waiting;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].blocks > 0) waiting.push_back(i);
  }
  while (!waiting.empty()) {
    std::vector<size_t> chosen;
    std::vector<size_t> later;
    int64_t blocks = 0;
    for (const size_t i : waiting) {
      if (key(i) != key(waiting.front()) || chosen.size() == kMaxLayers) {
        later.push_back(i);
        continue;
      }
      args.layer[chosen.size()] = layers[i].args;
      args.layer[chosen.size()].first_block = static_cast<uint32_t>(blocks);
      args.layer[chosen.size()].blocks = static_cast<uint32_t>(layers[i].blocks);
      chosen.push_back(i);
      blocks += layers[i].blocks;
    }
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "input: too many elements for one launch");
    args.count = static_cast<int32_t>(chosen.size());
    run(args, chosen, static_cast<unsigned>(blocks));
    waiting.swap(later);
  }
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> feature_distance(
    const std::vector<Tensor>& input,   // [k N, C, H, W] each
    const std::vector<Tensor>& target,  // [N, C, H, W] each
    const std::vector<Tensor>& mask,    // none, or [H, W] or [1|N|k N, 1|C, H, W] each
    const std::vector<double>& weights, const std::string& penalty, double param,
    const std::string& normalize, bool save_signs) {
  const size_t count = input.size();
  STD_TORCH_CHECK(count > 0 && target.size() == count && weights.size() == count &&
                      (mask.empty() || mask.size() == count),
                  "feature_distance: input, target, mask and weights must have one entry for each layer");
  const DeviceScope device(input[0]);
  const Penalty kind = parse_penalty(penalty);
  STD_TORCH_CHECK(!save_signs || kind == Penalty::l1, "save_signs needs penalty l1");
  std::vector<Layer> layers;
  std::vector<Tensor> signs;
  std::vector<double> numel;
  for (size_t i = 0; i < count; ++i) {
    const std::vector<int64_t> sizes = layer_sizes(input[i], target[i]);
    const bool channels_last = !input[i].is_contiguous() && is_channels_last(input[i]);
    layers.push_back(layer_shape(sizes, channels_last));
    Layer& layer = layers.back();
    const int64_t predictions = layer.args.predictions;
    signs.push_back(
        empty_1d(input[i], save_signs ? predictions * layer.shape.sign_bytes() : 0, ScalarType::Byte));
    numel.push_back(static_cast<double>(predictions) * static_cast<double>(layer.shape.numel()));
    if (numel.back() == 0) continue;
    set_images(layer, input[i], target[i], input[i].scalar_type(), channels_last);
    const int E = elements_of(layer.dtype);
    set_tiling(layer, sizes, mask.empty() ? nullptr : &mask[i], channels_last, E);
    const int64_t size = static_cast<int64_t>(layer.kept[0].element_size());
    layer.args.aligned = allows_vectors(layer.args.input, layer.shape.length, E, size) &&
                         allows_vectors(layer.args.target, layer.shape.length, E, size);
    if (!save_signs) continue;
    layer.args.signs = static_cast<uint16_t*>(signs.back().mutable_data_ptr());
    layer.args.sign_words = predictions * layer.shape.samples * layer.shape.segments * layer.shape.groups();
    layer.args.sign_words_allocated = signs.back().numel() / 2;
  }

  FeatureArgs args{};
  args.penalty = kind;
  args.param = static_cast<float>(param);
  std::vector<const void*> sums(count, nullptr);
  std::vector<Tensor> workspaces;
  for_groups(
      layers, [&](size_t i) { return layers[i].dtype; }, args,
      [&](FeatureArgs& group, const std::vector<size_t>& chosen, unsigned blocks) {
        workspaces.push_back(empty_1d(input[0], 2 * static_cast<int64_t>(blocks), ScalarType::Float));
        group.partials = workspaces.back().mutable_data_ptr();
        for (size_t k = 0; k < chosen.size(); ++k) {
          sums[chosen[k]] = static_cast<const Partial<1>*>(group.partials) + group.layer[k].first_block;
        }
        with_dtype("input", layers[chosen[0]].dtype, [&](auto type) {
          using T = typename decltype(type)::type;
          launch(kind == Penalty::l1 ? feature_forward<T, true> : feature_forward<T, false>, blocks, kThreads,
                 device, group);
        });
      });

  Tensor loss = empty_scalar(input[0], ScalarType::Float);
  Tensor scale = empty_1d(input[0], static_cast<int64_t>(count), ScalarType::Float);
  Tensor running = empty_1d(input[0], 1, ScalarType::Double);
  for (size_t first = 0; first < count; first += kMaxLayers) {
    FeatureTotalArgs total{};
    for (size_t i = first; i < std::min(first + kMaxLayers, count); ++i) {
      total.layer[total.count++] = {sums[i], layers[i].blocks, weights[i], numel[i]};
    }
    total.loss = static_cast<float*>(loss.mutable_data_ptr());
    total.scale = static_cast<float*>(scale.mutable_data_ptr()) + first;
    total.after = static_cast<double*>(running.mutable_data_ptr());
    total.before = first == 0 ? nullptr : total.after;
    total.normalize = parse_normalize(normalize);
    launch(feature_total, 1, kFinalThreads, device, total);
  }
  return {loss, scale, signs};
}

std::vector<Tensor> feature_distance_backward(
    const Tensor& grad,                 // []
    const Tensor& scale,                // [layers]
    const std::vector<Tensor>& signs,   // [bytes] each, l1
    const std::vector<Tensor>& mask,    // as forward
    const std::vector<Tensor>& input,   // [k N, C, H, W] each, other penalties
    const std::vector<Tensor>& target,  // [N, C, H, W] each, other penalties
    const std::vector<int64_t>& sizes,  // k N, C, H, W, N of every layer
    const std::vector<int64_t>& channels_last,
    const std::vector<int64_t>& dtypes,  // of the gradients: float32, float16, bfloat16
    const std::string& penalty, double param) {
  const size_t count = dtypes.size();
  const Penalty kind = parse_penalty(penalty);
  const bool l1 = kind == Penalty::l1;
  STD_TORCH_CHECK(sizes.size() == 5 * count && channels_last.size() == count &&
                      scale.numel() == static_cast<int64_t>(count) && scale.is_contiguous() &&
                      (mask.empty() || mask.size() == count) &&
                      (l1 ? signs.size() == count : input.size() == count && target.size() == count),
                  "feature_distance: every list must have one entry for each layer");
  const DeviceScope device(scale);
  FeatureArgs args{};
  args.grad = float_data(grad, "grad");
  args.scale = float_data(scale, "scale");
  args.penalty = kind;
  args.param = static_cast<float>(param);

  std::vector<Layer> layers;
  std::vector<Tensor> gradients;
  std::vector<ScalarType> types;
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(dtypes[i] >= 0 && dtypes[i] < 3,
                    "dtypes: the cuda backend takes float16, bfloat16 and float32");
    types.push_back(std::array{ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}[dtypes[i]]);
    const std::vector<int64_t> size(sizes.begin() + static_cast<int64_t>(5 * i),
                                    sizes.begin() + static_cast<int64_t>(5 * i + 5));
    const bool last = channels_last[i] != 0;
    layers.push_back(layer_shape(size, last));
    Layer& layer = layers.back();
    gradients.push_back(empty_image(scale, {size[0], size[1], size[2], size[3]}, last, types[i]));
    if (gradients.back().numel() == 0) continue;
    layer.dtype = types[i];
    if (!l1) set_images(layer, input[i], target[i], types[i], last);
    const int E = elements_of(layer.dtype);
    set_tiling(layer, size, mask.empty() ? nullptr : &mask[i], last, E);
    layer.args.scale_index = static_cast<int32_t>(i);
    layer.args.grad_input = gradients.back().mutable_data_ptr();
    layer.args.aligned = layer.shape.length % E == 0;
    if (l1) {
      STD_TORCH_CHECK(signs[i].numel() == layer.args.predictions * layer.shape.sign_bytes(),
                      "signs: wrong size");
      // The kernel of the backward only reads them.
      layer.args.signs = static_cast<uint16_t*>(const_cast<void*>(signs[i].const_data_ptr()));
    } else {
      const int64_t bytes = E * static_cast<int64_t>(layer.kept[0].element_size());
      layer.args.aligned =
          layer.args.aligned && is_aligned(layer.args.input, bytes) && is_aligned(layer.args.target, bytes);
    }
  }
  const auto key = [&](size_t i) { return std::pair(layers[i].dtype, types[i]); };
  for_groups(layers, key, args, [&](FeatureArgs& group, const std::vector<size_t>& chosen, unsigned blocks) {
    with_dtype("input", types[chosen[0]], [&](auto type) {
      using Out = typename decltype(type)::type;
      if (l1) {
        launch(feature_backward<Out, Out, true>, blocks, kThreads, device, group);
      } else if (layers[chosen[0]].dtype == types[chosen[0]]) {
        launch(feature_backward<Out, Out, false>, blocks, kThreads, device, group);
      } else {
        launch(feature_backward<float, Out, false>, blocks, kThreads, device, group);
      }
    });
  });
  return gradients;
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("feature_distance_cuda", TORCH_BOX(&ik::cuda::feature_distance));
  m.impl("feature_distance_backward_cuda", TORCH_BOX(&ik::cuda::feature_distance_backward));
}
