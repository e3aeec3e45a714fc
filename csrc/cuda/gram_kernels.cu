// Launches of the Gram kernels, shared by gram.cu and style.cu: compiled once for both.
#include <algorithm>
#include <array>
#include <limits>
#include <type_traits>

#include "cuda/gram_kernels.cuh"
#include "cuda/gram_launch.cuh"
#include "cuda/symmetric_product.cuh"

namespace ik::cuda {
namespace {

// Calls body(Type<T>(), bool_constant<channels_last>()).
template <typename Body>
void with_kind(ScalarType dtype, bool channels_last, const Body& body) {
  with_dtype("features", dtype, [&](auto type) {
    channels_last ? body(type, std::true_type()) : body(type, std::false_type());
  });
}

bool aligned_lines(const Features& features) {
  const int64_t line = features.channels_last ? features.channels() : features.pixels();
  return is_aligned(features.ready.const_data_ptr(), 16) &&
         line * static_cast<int64_t>(features.ready.element_size()) % 16 == 0;
}

unsigned block_count(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "features: too many for one launch");
  return static_cast<unsigned>(blocks);
}

float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// The products that torch's setting for fp32 matrices asks for. Python answers, as LibTorch's stable ABI does
// not reach the setting; asked at every launch, so that compiled graphs follow it.
Products products_of(ScalarType dtype) {
  if (dtype != ScalarType::Float) return Products::all;
  std::array<StableIValue, 1> stack{};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("inpaint_kernels::allows_tf32", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]) ? Products::big : Products::all;
}

// Partial Gram matrices of several feature maps, as few launches as dtypes and layouts allow.
std::vector<Tensor> all_partials(const std::vector<const Features*>& maps, const DeviceScope& device) {
  std::vector<Tensor> partials;
  std::vector<size_t> waiting;
  for (const Features* map : maps) {
    const GramSplit split = gram_split(map->channels(), map->pixels());
    const int64_t entries = map->samples() * split.tiles * split.parts * kGramEntries;
    if (entries > 0) waiting.push_back(partials.size());
    partials.push_back(empty_1d(map->ready, entries, ScalarType::Float));
  }
  while (!waiting.empty()) {
    const Features& like = *maps[waiting.front()];
    GramJobs jobs{};
    int64_t blocks = 0;
    std::vector<size_t> later;
    for (const size_t i : waiting) {
      const Features& map = *maps[i];
      if (map.dtype() != like.dtype() || map.channels_last != like.channels_last ||
          jobs.count == kMaxGramJobs) {
        later.push_back(i);
        continue;
      }
      GramJob& job = jobs.job[jobs.count++];
      job.features = map.ready.const_data_ptr();
      job.partials = floats(partials[i]);
      job.pixels = map.pixels();
      job.channels = static_cast<int32_t>(map.channels());
      job.split = gram_split(map.channels(), map.pixels());
      job.first_block = block_count(blocks);
      job.aligned = aligned_lines(map);
      blocks += map.samples() * job.split.tiles * job.split.parts;
    }
    jobs.products = products_of(like.dtype());
    with_kind(like.dtype(), like.channels_last, [&](auto type, auto channels_last) {
      launch(gram_partials<typename decltype(type)::type, decltype(channels_last)::value>,
             block_count(blocks), kGramThreads, device, jobs);
    });
    waiting.swap(later);
  }
  return partials;
}

}  // namespace

Features::Features(const Tensor& tensor) : ready(tensor) {
  STD_TORCH_CHECK(tensor.dim() == 4, "features must have 4 dimensions (N, C, H, W)");
  size.assign(tensor.sizes().begin(), tensor.sizes().end());
  // The tile numbers of a triangle must fit in 32 bits.
  STD_TORCH_CHECK(size[1] <= 1 << 20, "features: more than 2^20 channels");
  channels_last = !tensor.is_contiguous() && is_channels_last(tensor);
  ready = in_layout(tensor, channels_last);
}

Tensor gram_matrices(const Features& features, double scale, const DeviceScope& device) {
  const int64_t C = features.channels();
  const std::vector<Tensor> partials = all_partials({&features}, device);
  Tensor out = empty_strided(features.ready, {features.samples(), C, C}, {C * C, C, 1}, ScalarType::Float);
  GramTotalArgs args{};
  args.partials = static_cast<const float*>(partials[0].const_data_ptr());
  args.gram = floats(out);
  args.scale = scale;
  args.channels = static_cast<int32_t>(C);
  args.split = gram_split(C, features.pixels());
  const unsigned blocks = block_count(features.samples() * args.split.tiles * kStrips);
  if (blocks > 0) launch(gram_total, blocks, kStripThreads, device, args);
  return out;
}

Tensor style_loss(const std::vector<StyleLayer>& layers, bool l1, std::vector<Tensor>* factors,
                  const DeviceScope& device) {
  std::vector<const Features*> maps;
  for (const StyleLayer& layer : layers) {
    maps.push_back(&layer.input);
    if (layer.target) maps.push_back(&*layer.target);
  }
  const std::vector<Tensor> partials = all_partials(maps, device);

  std::vector<StyleJob> all;
  int64_t total = 0;
  size_t next = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const StyleLayer& layer = layers[i];
    StyleJob job{};
    job.input = static_cast<const float*>(partials[next++].const_data_ptr());
    const int64_t batch = layer.target ? layer.target->samples() : layer.gram->sizes()[0];
    if (layer.target) {
      job.target = static_cast<const float*>(partials[next++].const_data_ptr());
      job.target_split = gram_split(layer.target->channels(), layer.target->pixels());
    } else {
      job.gram = static_cast<const float*>(layer.gram->const_data_ptr());
    }
    if (factors != nullptr) job.factors = floats((*factors)[i]);
    job.input_scale = layer.input_scale;
    job.target_scale = layer.target_scale;
    job.weight = layer.weight;
    job.factor = static_cast<float>(2.0 * layer.input_scale * layer.weight);
    job.channels = static_cast<int32_t>(layer.input.channels());
    job.batch = static_cast<int32_t>(batch);
    job.predictions = batch > 0 ? static_cast<int32_t>(layer.input.samples() / batch) : 0;
    job.split = gram_split(layer.input.channels(), layer.input.pixels());
    all.push_back(job);
    total += batch * job.split.tiles * kStrips;
  }
  const Tensor& like = layers[0].input.ready;
  Tensor losses = empty_1d(like, total, ScalarType::Double);
  Tensor loss = empty_scalar(like, ScalarType::Float);
  double* partial_losses = static_cast<double*>(losses.mutable_data_ptr());
  int64_t done = 0;
  for (size_t first = 0; first < all.size(); first += kMaxStyleJobs) {
    StyleJobs jobs{};
    jobs.l1 = l1;
    jobs.losses = partial_losses + done;
    int64_t blocks = 0;
    for (size_t i = first; i < std::min(first + kMaxStyleJobs, all.size()); ++i) {
      all[i].first_block = block_count(blocks);
      blocks += static_cast<int64_t>(all[i].batch) * all[i].split.tiles * kStrips;
      jobs.job[jobs.count++] = all[i];
    }
    if (blocks > 0) launch(style_total, block_count(blocks), kStripThreads, device, jobs);
    done += blocks;
  }
  // Also for empty layers: it writes the zero.
  launch(style_loss_total, 1, kTotalThreads, device, static_cast<const double*>(partial_losses), total,
         floats(loss));
  return loss;
}

std::vector<Tensor> symmetric_products(const std::vector<Product>& products, const DeviceScope& device) {
  std::vector<Tensor> outs;
  std::vector<Tensor> workspaces;
  std::vector<size_t> waiting;
  for (const Product& product : products) {
    const Features& map = product.features;
    if (map.ready.numel() > 0) waiting.push_back(outs.size());
    outs.push_back(empty_image(map.ready, map.size, map.channels_last, map.dtype()));
  }
  while (!waiting.empty()) {
    const Features& like = products[waiting.front()].features;
    ProductJobs jobs{};
    int64_t blocks = 0;
    int64_t tiles = 0;
    std::vector<size_t> later;
    for (const size_t i : waiting) {
      const Product& product = products[i];
      const Features& map = product.features;
      if (map.dtype() != like.dtype() || map.channels_last != like.channels_last ||
          jobs.count == kMaxProductJobs) {
        later.push_back(i);
        continue;
      }
      ProductJob& job = jobs.job[jobs.count++];
      job.source = float_data(product.source, "factors");
      const auto strides = product.source.strides();
      const auto sizes = product.source.sizes();
      STD_TORCH_CHECK(sizes.size() == 3 && sizes[1] == map.channels() && sizes[2] == map.channels() &&
                          sizes[0] % map.samples() == 0,
                      "factors: expected [k N, C, C]");
      job.stride_n = strides[0];
      job.stride_row = strides[1];
      job.stride_column = strides[2];
      job.stride_copy = strides[0] * map.samples();
      job.copies = static_cast<int32_t>(sizes[0] / map.samples());
      job.add_transposed = product.add_transposed;
      job.multiplier = product.multiplier;
      if (product.grad != nullptr) job.grad = float_data(*product.grad, "grad");
      job.channels = static_cast<int32_t>(map.channels());
      job.side = (job.channels + kFactorTile - 1) / kFactorTile;
      job.pixels = map.pixels();
      const int64_t pixel_tiles = (job.pixels + kProductPixels - 1) / kProductPixels;
      job.pixel_tiles = static_cast<int32_t>(block_count(pixel_tiles));
      const int64_t tile_count = map.samples() * job.side * job.side;
      workspaces.push_back(empty_1d(map.ready, tile_count + map.samples(), ScalarType::Float));
      job.maxima = floats(workspaces.back());
      job.scale = job.maxima + tile_count;
      workspaces.push_back(empty_1d(map.ready, tile_count, ScalarType::Byte));
      job.low = static_cast<uint8_t*>(workspaces.back().mutable_data_ptr());
      const int64_t parts = map.dtype() == ScalarType::BFloat16 ? kParts<BFloat16> : kParts<Half>;
      workspaces.push_back(empty_1d(map.ready, parts * tile_count * kFactorTile * kFactorTile, map.dtype()));
      job.factor = workspaces.back().mutable_data_ptr();
      job.features = map.ready.const_data_ptr();
      job.out = outs[i].mutable_data_ptr();
      job.first_block = block_count(blocks);
      job.first_tile = block_count(tiles);
      job.aligned = aligned_lines(map) && is_aligned(job.out, 16);
      blocks += map.samples() * pixel_tiles * job.side;
      tiles += tile_count;
    }
    jobs.products = products_of(like.dtype());
    launch(factor_maxima, block_count(tiles), kFactorThreads, device, jobs);
    with_kind(like.dtype(), like.channels_last, [&](auto type, auto channels_last) {
      using T = typename decltype(type)::type;
      constexpr bool kChannelsLast = decltype(channels_last)::value;
      launch(split_factor<T>, block_count(tiles), kFactorThreads, device, jobs);
      launch_shared(symmetric_product<T, kChannelsLast>, block_count(blocks), kProductThreads,
                    ProductMemory<T, kChannelsLast>::kBytes, device, jobs);
    });
    waiting.swap(later);
  }
  return outs;
}

}  // namespace ik::cuda
