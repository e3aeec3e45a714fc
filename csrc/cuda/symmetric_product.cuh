// Backward kernels of Gram matrices and of the style loss: out_n = factor F_n X_n, F symmetric [C, C].
//
// Three launches for all layers. The first two sum F over the predictions (or form dG + dG^T), divide it by
// its largest finite entry and split it into a high and low parts of the features' type (TF32 for fp32),
// padded with zeros to whole tiles. The entries of the l1 style loss are then exactly 0, 1/2 or 1 (or simple
// fractions): the low parts are zero, which a flag tells, and their products are skipped. The third is the
// product, F X + F_low X, with 128 pixels x 64 channels a block; blocks of the same pixels are neighbours and
// share them in L2. Where torch's setting allows TF32, fp32 features take the high parts alone.
//
// Bytes: X once for every 64 channels (from L2 after the first), out once in 16-byte stores.
#pragma once

#include "cuda/gram_tile.cuh"

namespace ik::cuda {

constexpr int kFactorTile = 64;
constexpr int kFactorThreads = 256;
constexpr int kFactorEntries = kFactorTile * kFactorTile / kFactorThreads;
constexpr int kProductPixels = 128;
constexpr int kProductChannels = kFactorTile;
constexpr int kProductThreads = 256;
constexpr int kProductStages = 3;
constexpr int kMaxProductJobs = 8;

struct ProductJob {
  // F before it is split: factor_ij = sum over predictions of source[j N + n][i][j], with `add_transposed` of
  // [j][i] too.
  const float* source;  // [k N, C, C]
  int64_t stride_n;
  int64_t stride_row;
  int64_t stride_column;
  int32_t samples;      // N
  int32_t predictions;  // k
  bool add_transposed;
  float multiplier;
  const float* grad;  // scalar on the device, or null

  float* maxima;         // [N, side, side] largest finite absolute entry of every tile
  float* scale;          // [N] factor of the finished product
  uint8_t* low;          // [N, side, side] whether a tile has low parts
  void* factor;          // [N, kParts (high, low ..), side * 64, side * 64] in the features' type
  const void* features;  // [N, C, M], channels_last: [N, M, C]
  void* out;             // like the features
  int64_t pixels;
  int32_t channels;
  int32_t side;  // tiles of 64 channels
  int32_t pixel_tiles;
  uint32_t first_block;  // of the product
  uint32_t first_tile;   // of the factor launches
  bool aligned;          // every row of features and out starts at a multiple of 16 bytes
};

struct ProductJobs {
  ProductJob job[kMaxProductJobs];
  int32_t count;
  Products products;  // of fp32
};

struct FactorTile {
  int64_t sample;
  int32_t row;  // in tiles
  int32_t column;
  int64_t index;  // over the batch
};

template <typename Jobs>
IK_DEVICE int find_tile_job(const Jobs& jobs) {
  int i = 0;
  while (i + 1 < jobs.count && blockIdx.x >= jobs.job[i + 1].first_tile) ++i;
  return i;
}

IK_DEVICE FactorTile factor_tile(const ProductJob& job) {
  const uint32_t side = static_cast<uint32_t>(job.side);
  const uint32_t index = blockIdx.x - job.first_tile;
  return {index / (side * side), static_cast<int>(index / side % side), static_cast<int>(index % side),
          index};
}

// This thread's entries of a tile: row `thread / 64 + 4 i`, column `thread % 64`; zero outside C x C.
IK_DEVICE void factor_entries(const ProductJob& job, const FactorTile& tile, float (&value)[kFactorEntries]) {
  constexpr int kRows = kFactorThreads / kFactorTile;
  __shared__ float turned[kFactorTile][kFactorTile + 1];
  const int thread = static_cast<int>(threadIdx.x);
  const int first = thread / kFactorTile;
  const int second = thread % kFactorTile;
  const float* source = job.source + tile.sample * job.stride_n;
  const int64_t column = tile.column * kFactorTile + second;
  if (job.add_transposed) {
    const int64_t turned_column = tile.row * kFactorTile + second;
#pragma unroll 4
    for (int i = 0; i < kFactorEntries; ++i) {
      const int r = first + kRows * i;
      const int64_t row = tile.column * kFactorTile + r;
      const bool inside = row < job.channels && turned_column < job.channels;
      turned[second][r] = inside ? source[row * job.stride_row + turned_column * job.stride_column] : 0.0f;
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kFactorEntries; ++i)
    value[i] = job.add_transposed ? turned[first + kRows * i][second] : 0.0f;
#pragma unroll 1
  for (int prediction = 0; prediction < job.predictions; ++prediction) {
    const float* entry =
        source + static_cast<int64_t>(prediction) * job.samples * job.stride_n + column * job.stride_column;
#pragma unroll
    for (int i = 0; i < kFactorEntries; ++i) {
      const int64_t row = tile.row * kFactorTile + first + kRows * i;
      if (row < job.channels && column < job.channels) value[i] += entry[row * job.stride_row];
    }
  }
}

IK_DEVICE float warp_maximum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  return value;
}

static __global__ void __launch_bounds__(kFactorThreads)
    factor_maxima(const IK_GRID_CONSTANT ProductJobs jobs) {
  const ProductJob& job = jobs.job[find_tile_job(jobs)];
  const FactorTile tile = factor_tile(job);
  float value[kFactorEntries];
  factor_entries(job, tile, value);
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kFactorEntries; ++i) {
    if (is_finite(value[i])) largest = fmaxf(largest, fabsf(value[i]));
  }
  __shared__ float warps[kFactorThreads / kWarp];
  largest = warp_maximum(largest);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kFactorThreads / kWarp; ++w) largest = fmaxf(largest, warps[w]);
  job.maxima[tile.index] = largest;
}

template <typename T>
IK_DEVICE T to_factor(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return bits_to_float(round_tf32(value));
  } else {
    return T(static_cast<uint16_t>(round_pair<T>(value, 0.0f)), T::from_bits());
  }
}

template <typename T>
__global__ void __launch_bounds__(kFactorThreads) split_factor(const IK_GRID_CONSTANT ProductJobs jobs) {
  const ProductJob& job = jobs.job[find_tile_job(jobs)];
  const FactorTile tile = factor_tile(job);
  const int thread = static_cast<int>(threadIdx.x);
  // Every warp goes over all tiles' maxima: a few, and no barrier needed.
  const int tiles = job.side * job.side;
  const float* maxima = job.maxima + tile.sample * tiles;
  float largest = 0.0f;
  for (int i = thread % kWarp; i < tiles; i += kWarp) largest = fmaxf(largest, maxima[i]);
  largest = warp_maximum(largest);
  // Nothing to divide by, and infinite entries stay infinite.
  if (largest == 0.0f) largest = 1.0f;
  if (tile.row == 0 && tile.column == 0 && thread == 0) {
    const float grad = job.grad == nullptr ? 1.0f : *job.grad;
    job.scale[tile.sample] = largest * job.multiplier * grad;
  }
  float value[kFactorEntries];
  factor_entries(job, tile, value);
  const int64_t width = static_cast<int64_t>(job.side) * kFactorTile;
  const int64_t row = tile.row * kFactorTile + thread / kFactorTile;
  T* high = static_cast<T*>(job.factor) + tile.sample * kParts<T> * width * width + row * width +
            tile.column * kFactorTile + thread % kFactorTile;
  bool has_low = false;
#pragma unroll
  for (int i = 0; i < kFactorEntries; ++i) {
    float rest = value[i] / largest;
#pragma unroll
    for (int part = 0; part < kParts<T>; ++part) {
      const T rounded = to_factor<T>(rest);
      high[part * width * width] = rounded;
      // No low part of Inf or NaN.
      rest = is_finite(static_cast<float>(rounded)) ? rest - static_cast<float>(rounded) : 0.0f;
      if (part == 0) has_low = has_low || !(rest == 0.0f);
    }
    high += kFactorThreads / kFactorTile * width;
  }
  const bool any = __syncthreads_or(has_low) != 0;
  if (thread == 0) job.low[tile.index] = any ? 1 : 0;
}

// Shared memory of the product: the stages, and afterwards the finished tile in the layout of `out`.
template <typename T, bool kChannelsLast>
struct ProductMemory {
  using Pixels = TileShape<T, kProductPixels, !kChannelsLast>;
  using Factor = TileShape<T, kProductChannels, false>;
  static constexpr int kStage = Pixels::kBytes + kParts<T> * Factor::kBytes;
  static constexpr int kOutLines = kChannelsLast ? kProductPixels : kProductChannels;
  static constexpr int kOutLength = kChannelsLast ? kProductChannels : kProductPixels;
  static constexpr int kOutPitch = kOutLength * static_cast<int>(sizeof(T)) + 16;
  static constexpr int kStages = kProductStages * kStage;
  static constexpr int kOut = kOutLines * kOutPitch;
  static constexpr int kBytes = kStages > kOut ? kStages : kOut;
};

template <typename T>
IK_DEVICE void store_sum(char* to, float value) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float*>(to) = value;
  } else {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(round_pair<T>(value, 0.0f));
  }
}

// An entry of the product without tensor cores, up to the first NaN.
template <typename T>
IK_DEVICE float plain_sum(const T* factor, int64_t part_step, const T* features, int64_t channel_step,
                          int channels) {
  float sum = 0.0f;
#pragma unroll 1
  for (int channel = 0; channel < channels && !is_nan(sum); ++channel) {
    float whole = 0.0f;
    for (int part = kParts<T> - 1; part >= 0; --part) {
      whole += static_cast<float>(factor[part * part_step + channel]);
    }
    sum += whole * static_cast<float>(features[channel * channel_step]);
  }
  return sum;
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kProductThreads, 2)
    symmetric_product(const IK_GRID_CONSTANT ProductJobs jobs) {
  using Memory = ProductMemory<T, kChannelsLast>;
  using Pixels = typename Memory::Pixels;
  using Factor = typename Memory::Factor;
  IK_DYNAMIC_SHARED(memory);
  const ProductJob& job = jobs.job[find_job(jobs.job, jobs.count)];
  const uint32_t block = blockIdx.x - job.first_block;
  const int channel_tile = static_cast<int>(block % static_cast<uint32_t>(job.side));
  const uint32_t rest = block / static_cast<uint32_t>(job.side);
  const int64_t first_pixel =
      static_cast<int64_t>(rest % static_cast<uint32_t>(job.pixel_tiles)) * kProductPixels;
  const int sample = static_cast<int>(rest / static_cast<uint32_t>(job.pixel_tiles));
  const int64_t left = job.pixels - first_pixel;
  const int pixels = static_cast<int>(left < kProductPixels ? left : kProductPixels);
  const int first_channel = channel_tile * kProductChannels;
  const int stages = (job.channels + kDepth<T> - 1) / kDepth<T>;
  const int64_t width = static_cast<int64_t>(job.side) * kFactorTile;
  const uint8_t* flags = job.low + (static_cast<int64_t>(sample) * job.side + channel_tile) * job.side;
  bool has_low = false;
  for (int i = 0; i < job.side; ++i) has_low = has_low || flags[i] != 0;
  constexpr bool kFull = sizeof(T) == 4;
  const bool big = kFull && jobs.products == Products::big;
  has_low = has_low && !big;

  const int64_t line = kChannelsLast ? job.channels : job.pixels;  // elements from line to line
  const int64_t channel_step = kChannelsLast ? 1 : job.pixels;
  const T* features = static_cast<const T*>(job.features) + job.pixels * job.channels * sample +
                      first_pixel * (kChannelsLast ? job.channels : 1);
  const T* factor =
      static_cast<const T*>(job.factor) + kParts<T> * width * width * sample + first_channel * width;
  const int parts = has_low ? kParts<T> : 1;
  const auto load = [&](int stage) {
    if (stage < stages) {
      char* to = memory + stage % kProductStages * Memory::kStage;
      const int channel = stage * kDepth<T>;
      const int channels = job.channels - channel;
      load_tile<T, Pixels, kProductThreads>(to, features + channel * channel_step, line,
                                            kChannelsLast ? pixels : channels,
                                            kChannelsLast ? channels : pixels, job.aligned);
      to += Pixels::kBytes;
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        load_tile<T, Factor, kProductThreads>(to + part * Factor::kBytes,
                                              factor + part * width * width + channel, width,
                                              kProductChannels, kDepth<T>, true);
      }
    }
    commit_copies();
  };

  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_pixel = warp / 2 * kWarpRows;
  const int warp_channel = warp % 2 * kWarpRows;
  WarpSums sums = {};
#pragma unroll 1
  for (int stage = 0; stage < kProductStages - 1; ++stage) load(stage);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copies<kProductStages - 2>();
    // Everyone's copies are there, and everyone is done with the stage that the next load overwrites.
    __syncthreads();
    load(stage + kProductStages - 1);
    const char* a = memory + stage % kProductStages * Memory::kStage;
    const char* b = a + Pixels::kBytes;
    if (has_low) {
      multiply_stage<T, Pixels, Factor, Products::all, Low::tiles>(a, warp_pixel, b, warp_channel, sums);
    } else if (big) {
      multiply_stage<T, Pixels, Factor, Products::big, Low::none>(a, warp_pixel, b, warp_channel, sums);
    } else {
      multiply_stage<T, Pixels, Factor, Products::all, Low::none>(a, warp_pixel, b, warp_channel, sums);
    }
  }
  // The fragments hold 2 neighbours; through shared memory every thread stores 16 bytes.
  const bool nan = __syncthreads_or(has_nan(sums)) != 0;
  const float scale = job.scale[sample];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pixel = warp_pixel + sum_row(m, i / 2);
        const int channel = warp_channel + sum_column(n) + i % 2;
        const int y = kChannelsLast ? pixel : channel;
        const int x = kChannelsLast ? channel : pixel;
        store_sum<T>(memory + y * Memory::kOutPitch + x * static_cast<int>(sizeof(T)), sums[m][n][i] * scale);
      }
    }
  }
  __syncthreads();
  constexpr int kPieces = Memory::kOutLength / kPiece<T>;
  const int channels = job.channels - first_channel;
  const int lines = kChannelsLast ? pixels : channels;
  const int length = kChannelsLast ? channels : pixels;
  if (nan) {
    // Low parts may have made it of Inf, see gram_tile.cuh.
    const int64_t pixel_step = kChannelsLast ? job.channels : 1;
#pragma unroll 1
    for (int entry = static_cast<int>(threadIdx.x); entry < Memory::kOutLines * Memory::kOutLength;
         entry += kProductThreads) {
      const int y = entry / Memory::kOutLength;
      const int x = entry % Memory::kOutLength;
      char* to = memory + y * Memory::kOutPitch + x * static_cast<int>(sizeof(T));
      if (y >= lines || x >= length || !is_nan(static_cast<float>(*reinterpret_cast<const T*>(to)))) continue;
      const T* row = factor + (kChannelsLast ? x : y) * width;
      const T* column = features + (kChannelsLast ? y : x) * pixel_step;
      store_sum<T>(to, plain_sum(row, width * width, column, channel_step, job.channels) * scale);
    }
    __syncthreads();
  }
  T* out = static_cast<T*>(job.out) + (features - static_cast<const T*>(job.features)) +
           first_channel * channel_step;
#pragma unroll 1
  for (int piece = static_cast<int>(threadIdx.x); piece < Memory::kOutLines * kPieces;
       piece += kProductThreads) {
    const int y = piece / kPieces;
    const int x = piece % kPieces * kPiece<T>;
    if (y >= lines || x >= length) continue;
    const char* from = memory + y * Memory::kOutPitch + x * static_cast<int>(sizeof(T));
    T* to = out + y * line + x;
    if (job.aligned) {
      *reinterpret_cast<Words*>(to) = *reinterpret_cast<const Words*>(from);
    } else {
      for (int k = 0; k < kPiece<T> && x + k < length; ++k) to[k] = reinterpret_cast<const T*>(from)[k];
    }
  }
}

}  // namespace ik::cuda
