// Launches of the Gram kernels, shared by gram.cu and style.cu: compiled once for both.
#include <algorithm>
#include <array>
#include <type_traits>

#include "cuda/gram_kernels.cuh"
#include "cuda/gram_launch.cuh"
#include "cuda/symmetric_product.cuh"

namespace ik::cuda {
namespace {

bool aligned_lines(const Features& features) {
  const int64_t line = features.channels_last ? features.channels() : features.pixels();
  return is_aligned(features.ready.const_data_ptr(), 16) &&
         line * static_cast<int64_t>(features.ready.element_size()) % 16 == 0;
}

// The products that torch's setting for fp32 matrices asks for. Python answers, as LibTorch's stable ABI does
// not reach the setting; asked at every launch, so that compiled graphs follow it.
Products products_of(ScalarType dtype) {
  if (dtype != ScalarType::Float) return Products::all;
  std::array<StableIValue, 1> stack{};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("inpaint_kernels::allows_tf32", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]) ? Products::big : Products::all;
}

// Calls run(indices, type, channels_last) for each launch of the maps in `waiting`: of those of one dtype and
// layout.
template <typename Run>
void for_kinds(const std::vector<const Features*>& maps, const std::vector<size_t>& waiting, size_t most,
               const Run& run) {
  const auto agree = [&](size_t a, size_t b) {
    return maps[a]->dtype() == maps[b]->dtype() && maps[a]->channels_last == maps[b]->channels_last;
  };
  for_launches(waiting, most, agree, [&](const std::vector<size_t>& chosen) {
    const Features& first = *maps[chosen[0]];
    with_dtype("features", first.dtype(), [&](auto type) {
      first.channels_last ? run(chosen, type, std::true_type()) : run(chosen, type, std::false_type());
    });
  });
}

// Partial Gram matrices of several feature maps.
std::vector<Tensor> all_partials(const std::vector<const Features*>& maps, const DeviceScope& device) {
  std::vector<Tensor> partials;
  std::vector<size_t> waiting;
  for (const Features* map : maps) {
    const GramSplit split = gram_split(map->channels(), map->pixels());
    const int64_t entries = map->samples() * split.tiles * split.parts * kGramEntries;
    if (entries > 0) waiting.push_back(partials.size());
    partials.push_back(empty_1d(map->ready, entries, ScalarType::Float));
  }
  for_kinds(maps, waiting, kMaxGramJobs, [&](const auto& chosen, auto type, auto channels_last) {
    GramJobs jobs{};
    int64_t blocks = 0;
    for (const size_t i : chosen) {
      const Features& map = *maps[i];
      GramJob& job = jobs.job[jobs.count++];
      job.features = map.ready.const_data_ptr();
      job.partials = float_output(partials[i]);
      job.pixels = map.pixels();
      job.channels = static_cast<int32_t>(map.channels());
      job.split = gram_split(map.channels(), map.pixels());
      job.first_block = grid_size(blocks, "features");
      job.aligned = aligned_lines(map);
      blocks += map.samples() * job.split.tiles * job.split.parts;
    }
    jobs.products = products_of(maps[chosen[0]]->dtype());
    launch(gram_partials<typename decltype(type)::type, decltype(channels_last)::value>,
           grid_size(blocks, "features"), kGramThreads, device, jobs);
  });
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
  args.gram = float_output(out);
  args.scale = scale;
  args.channels = static_cast<int32_t>(C);
  args.split = gram_split(C, features.pixels());
  const unsigned blocks = grid_size(features.samples() * args.split.tiles * kStrips, "features");
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
    if (factors != nullptr) job.factors = float_output((*factors)[i]);
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
      all[i].first_block = grid_size(blocks, "features");
      blocks += static_cast<int64_t>(all[i].batch) * all[i].split.tiles * kStrips;
      jobs.job[jobs.count++] = all[i];
    }
    if (blocks > 0) launch(style_total, grid_size(blocks, "features"), kStripThreads, device, jobs);
    done += blocks;
  }
  // Also for empty layers: it writes the zero.
  launch(total_of_parts<double>, 1, kTotalThreads, device, static_cast<const double*>(partial_losses), total,
         float_output(loss));
  return loss;
}

std::vector<Tensor> symmetric_products(const std::vector<Product>& products, const DeviceScope& device) {
  std::vector<Tensor> outs;
  std::vector<Tensor> workspaces;
  std::vector<const Features*> maps;
  std::vector<size_t> waiting;
  for (const Product& product : products) {
    const Features& map = product.features;
    if (map.ready.numel() > 0) waiting.push_back(outs.size());
    maps.push_back(&map);
    outs.push_back(empty_image(map.ready, map.size, map.channels_last, map.dtype()));
  }
  for_kinds(maps, waiting, kMaxProductJobs, [&](const auto& chosen, auto type, auto channels_last) {
    using T = typename decltype(type)::type;
    constexpr bool kChannelsLast = decltype(channels_last)::value;
    ProductJobs jobs{};
    int64_t blocks = 0;
    int64_t tiles = 0;
    for (const size_t i : chosen) {
      const Product& product = products[i];
      const Features& map = product.features;
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
      job.predictions = static_cast<int32_t>(sizes[0] / map.samples());
      job.samples = static_cast<int32_t>(map.samples());
      job.add_transposed = product.add_transposed;
      job.multiplier = product.multiplier;
      if (product.grad != nullptr) job.grad = float_data(*product.grad, "grad");
      job.channels = static_cast<int32_t>(map.channels());
      job.side = static_cast<int32_t>(ceil_div(job.channels, kFactorTile));
      job.pixels = map.pixels();
      const int64_t pixel_tiles = ceil_div(job.pixels, kProductPixels);
      job.pixel_tiles = static_cast<int32_t>(grid_size(pixel_tiles, "features"));
      const int64_t tile_count = map.samples() * job.side * job.side;
      const auto workspace = [&](int64_t size, ScalarType dtype) {
        workspaces.push_back(empty_1d(map.ready, size, dtype));
        return workspaces.back().mutable_data_ptr();
      };
      job.maxima = static_cast<float*>(workspace(tile_count, ScalarType::Float));
      job.scale = static_cast<float*>(workspace(map.samples(), ScalarType::Float));
      job.low = static_cast<uint8_t*>(workspace(tile_count, ScalarType::Byte));
      job.factor = workspace(kParts<T> * tile_count * kFactorTile * kFactorTile, map.dtype());
      job.features = map.ready.const_data_ptr();
      job.out = outs[i].mutable_data_ptr();
      job.first_block = grid_size(blocks, "features");
      job.first_tile = grid_size(tiles, "features");
      job.aligned = aligned_lines(map) && is_aligned(job.out, 16);
      blocks += map.samples() * pixel_tiles * job.side;
      tiles += tile_count;
    }
    jobs.products = products_of(maps[chosen[0]]->dtype());
    launch(factor_maxima, grid_size(tiles, "features"), kFactorThreads, device, jobs);
    launch(split_factor<T>, grid_size(tiles, "features"), kFactorThreads, device, jobs);
    launch_shared(symmetric_product<T, kChannelsLast>, grid_size(blocks, "features"), kProductThreads,
                  ProductMemory<T, kChannelsLast>::kBytes, device, jobs);
  });
  return outs;
}

}  // namespace ik::cuda
