// Forward kernels of Gram matrices and of the style loss.
//
//   G = s X X^T, X [C, M];   loss = w coefficient sum p(G - G')
//
// First stage: one block for a 64 x 64 tile of the lower triangle of one sample and one part of its pixels;
// the partial tiles go to a workspace. Tiles, parts and with them all sums depend on C and M alone: a sample
// has the same matrix in every batch. Blocks of all layers, inputs and targets fill one launch; tiles of the
// same pixels are neighbours and share them in L2. Second stage: a block adds the parts of 16 rows of a tile
// in double, in order, and forms the matrix, or the loss, its factor F (d loss / d X = F X) and a partial
// loss.
//
// Bytes: X once for every 64 rows of C (once in all for C <= 64), 16 KB written and read for each tile and
// part.
#pragma once

#include "common/gram.h"
#include "cuda/gram_tile.cuh"

namespace ik::cuda {

constexpr int kGramTile = 64;
constexpr int kGramEntries = kGramTile * kGramTile;
constexpr int kGramThreads = 128;
constexpr int kGramStages = 4;
constexpr int kStripRows = 16;
constexpr int kStrips = kGramTile / kStripRows;
constexpr int kStripThreads = 256;
constexpr int kMaxGramJobs = 16;
constexpr int kMaxStyleJobs = 8;

// How the Gram matrix of one sample is cut up.
struct GramSplit {
  int32_t tiles;  // of the lower triangle
  int32_t parts;
  int32_t part_pixels;
};

static inline GramSplit gram_split(int64_t channels, int64_t pixels) {
  const int64_t side = ceil_div(channels, kGramTile);
  GramSplit split{static_cast<int32_t>(side * (side + 1) / 2), 0, 0};
  if (split.tiles == 0 || pixels == 0) return split;
  // 64 blocks a sample fill a GPU from two samples on. A part shorter than 512 pixels would write a sizeable
  // share of what it reads, one longer than 8192 would add up too many roundings.
  const int64_t wanted = split.tiles < 64 ? 64 / split.tiles : 1;
  int64_t length = ceil_div(pixels, wanted);
  length = length < 512 ? 512 : (length < 8192 ? length : 8192);
  length = ceil_div(length, 64) * 64;
  split.part_pixels = static_cast<int32_t>(length);
  split.parts = static_cast<int32_t>(ceil_div(pixels, length));
  return split;
}

// Tile `index` of the lower triangle, row by row: (0,0) (1,0) (1,1) (2,0) ...
struct TileCoord {
  int32_t row;
  int32_t column;
};

IK_HD TileCoord tile_coord(int index) {
  int row = 0;
  while (index > row) index -= ++row;
  return {row, index};
}

struct GramJob {
  const void* features;  // [N, C, M], channels_last: [N, M, C]
  float* partials;       // [N, tiles, parts, 64, 64]
  int64_t pixels;
  int32_t channels;
  GramSplit split;
  uint32_t first_block;
  bool aligned;  // every row starts at a multiple of 16 bytes
};

struct GramJobs {
  GramJob job[kMaxGramJobs];
  int32_t count;
  Products products;  // of fp32
};

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kGramThreads, 4) gram_partials(const IK_GRID_CONSTANT GramJobs jobs) {
  using Shape = TileShape<T, kGramTile, kChannelsLast>;
  __shared__ Words memory[kGramStages][2][Shape::kBytes / 16];
  const GramJob& job = jobs.job[find_job(jobs.job, jobs.count)];
  const uint32_t block = blockIdx.x - job.first_block;
  const int tile_index = static_cast<int>(block % static_cast<uint32_t>(job.split.tiles));
  const uint32_t rest = block / static_cast<uint32_t>(job.split.tiles);
  const int part = static_cast<int>(rest % static_cast<uint32_t>(job.split.parts));
  const int64_t sample = rest / static_cast<uint32_t>(job.split.parts);
  const TileCoord tile = tile_coord(tile_index);
  const bool diagonal = tile.row == tile.column;
  const int64_t begin = static_cast<int64_t>(part) * job.split.part_pixels;
  const int64_t left = job.pixels - begin;
  const int length = static_cast<int>(left < job.split.part_pixels ? left : job.split.part_pixels);
  const int stages = (length + kDepth<T> - 1) / kDepth<T>;

  const int64_t line = kChannelsLast ? job.channels : job.pixels;  // elements from line to line
  const int64_t row_step = kGramTile * (kChannelsLast ? 1 : job.pixels);
  const int64_t pixel_step = kChannelsLast ? job.channels : 1;
  const T* first =
      static_cast<const T*>(job.features) + sample * job.channels * job.pixels + begin * pixel_step;
  const auto load = [&](int stage) {
    if (stage < stages) {
      const int depth = length - stage * kDepth<T>;
#pragma unroll
      for (int operand = 0; operand < 2; ++operand) {
        if (operand == 1 && diagonal) break;
        const int index = operand == 0 ? tile.row : tile.column;
        const int rows = job.channels - index * kGramTile;
        const T* source = first + index * row_step + static_cast<int64_t>(stage) * kDepth<T> * pixel_step;
        load_tile<T, Shape, kGramThreads>(reinterpret_cast<char*>(memory[stage % kGramStages][operand]),
                                          source, line, kChannelsLast ? depth : rows,
                                          kChannelsLast ? rows : depth, job.aligned);
      }
    }
    // Also without copies: the count of groups tells which stage has arrived.
    commit_copies();
  };

  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_row = warp / 2 * kWarpRows;
  const int warp_column = warp % 2 * kWarpRows;
  // Above the diagonal.
  const bool idle = diagonal && warp_column > warp_row;
  float* out =
      job.partials + ((sample * job.split.tiles + tile_index) * job.split.parts + part) * kGramEntries;
  // Makes and stores the sums, `again` only where they were NaN; tells whether one of them is NaN.
  const auto make = [&](auto products, bool again) {
    WarpSums sums = {};
#pragma unroll 1
    for (int stage = 0; stage < kGramStages - 1; ++stage) load(stage);
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      wait_for_copies<kGramStages - 2>();
      // Everyone's copies are there, and everyone is done with the stage that the next load overwrites.
      __syncthreads();
      load(stage + kGramStages - 1);
      const char* rows = reinterpret_cast<const char*>(memory[stage % kGramStages][0]);
      const char* columns = diagonal ? rows : reinterpret_cast<const char*>(memory[stage % kGramStages][1]);
      constexpr Low kLow = sizeof(T) == 4 ? Low::split : Low::none;
      if (!idle) {
        multiply_stage<T, Shape, Shape, decltype(products)::value, kLow>(rows, warp_row, columns, warp_column,
                                                                         sums);
      }
    }
    if (idle) return false;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          float* entries = out + (warp_row + sum_row(m, pair)) * kGramTile + warp_column + sum_column(n);
          const float* sum = &sums[m][n][2 * pair];
          const bool keep[2] = {again && !is_nan(entries[0]), again && !is_nan(entries[1])};
          store_pair(entries, keep[0] ? entries[0] : sum[0], keep[1] ? entries[1] : sum[1]);
        }
      }
    }
    return has_nan(sums);
  };
  bool again = false;
  if constexpr (sizeof(T) == 4) {
    if (jobs.products == Products::all) {
      again = __syncthreads_or(make(Constant<Products::all>(), false)) != 0;
      if (!again) return;
    }
  }
  make(Constant<Products::big>(), again);
}

// Where a thread of the second stage works: four neighbours of one row, in the tile and in the matrix.
struct StripCoord {
  int64_t sample;
  int32_t tile;
  int32_t strip;
  int32_t row;     // of the matrix
  int32_t column;  // of the matrix, the first of four
  int32_t offset;  // in the tile

  __device__ __forceinline__ bool counts(int q, int channels) const {
    return row < channels && column + q <= row;
  }
};

IK_DEVICE StripCoord strip_coord(uint32_t block, const GramSplit& split) {
  StripCoord coord;
  const uint32_t tiles = static_cast<uint32_t>(split.tiles);
  coord.strip = static_cast<int>(block % kStrips);
  coord.tile = static_cast<int>(block / kStrips % tiles);
  coord.sample = block / kStrips / tiles;
  const TileCoord tile = tile_coord(coord.tile);
  const int thread = static_cast<int>(threadIdx.x);
  const int row = coord.strip * kStripRows + thread / (kGramTile / 4);
  const int column = thread % (kGramTile / 4) * 4;
  coord.row = tile.row * kGramTile + row;
  coord.column = tile.column * kGramTile + column;
  coord.offset = row * kGramTile + column;
  return coord;
}

// The four entries of sample `sample`, added over its parts and scaled. Entries above the diagonal are
// undefined.
IK_DEVICE void add_parts(const float* partials, const GramSplit& split, int64_t sample,
                         const StripCoord& coord, double scale, float (&gram)[4]) {
  const float* data =
      partials + (sample * split.tiles + coord.tile) * split.parts * kGramEntries + coord.offset;
  double sum[4] = {};
#pragma unroll 4
  for (int part = 0; part < split.parts; ++part) {
    const Words words = *reinterpret_cast<const Words*>(data + static_cast<int64_t>(part) * kGramEntries);
#pragma unroll
    for (int q = 0; q < 4; ++q) sum[q] += static_cast<double>(bits_to_float(words.word[q]));
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) gram[q] = static_cast<float>(sum[q] * scale);
}

// Stores a strip of a symmetric matrix [C, C] and its mirror image. Called by all threads.
IK_DEVICE void store_symmetric(const StripCoord& coord, const float (&value)[4], int channels, float* out) {
  __shared__ float strip[kStripRows][kGramTile + 1];
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    strip[thread / (kGramTile / 4)][thread % (kGramTile / 4) * 4 + q] = value[q];
    if (coord.counts(q, channels)) {
      out[static_cast<int64_t>(coord.row) * channels + coord.column + q] = value[q];
    }
  }
  __syncthreads();
  const TileCoord tile = tile_coord(coord.tile);
  const int column = tile.column * kGramTile + thread / 4;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int r = thread % 4 * 4 + q;
    const int row = tile.row * kGramTile + coord.strip * kStripRows + r;
    if (row < channels && column < row)
      out[static_cast<int64_t>(column) * channels + row] = strip[r][thread / 4];
  }
}

struct GramTotalArgs {
  const float* partials;
  float* gram;  // [N, C, C]
  double scale;
  int32_t channels;
  GramSplit split;
};

static __global__ void __launch_bounds__(kStripThreads) gram_total(const GramTotalArgs args) {
  const StripCoord coord = strip_coord(blockIdx.x, args.split);
  float value[4];
  add_parts(args.partials, args.split, coord.sample, coord, args.scale, value);
  store_symmetric(coord, value, args.channels, args.gram + coord.sample * args.channels * args.channels);
}

struct StyleJob {
  const float* input;   // partials [k N, tiles, parts, 64, 64]
  const float* target;  // partials [N, tiles, target parts, 64, 64], unless a matrix is given
  const float* gram;    // [N, C, C], or null
  float* factors;       // [k N, C, C] or null
  double input_scale;
  double target_scale;
  double weight;  // of the summed penalties
  float factor;   // 2 input_scale weight
  int32_t channels;
  int32_t batch;        // N
  int32_t predictions;  // k
  GramSplit split;
  GramSplit target_split;
  uint32_t first_block;
};

struct StyleJobs {
  StyleJob job[kMaxStyleJobs];
  double* losses;  // one for each block
  int32_t count;
  bool l1;
};

static __global__ void __launch_bounds__(kStripThreads) style_total(const IK_GRID_CONSTANT StyleJobs jobs) {
  const StyleJob& job = jobs.job[find_job(jobs.job, jobs.count)];
  const StripCoord coord = strip_coord(blockIdx.x - job.first_block, job.split);
  const int64_t matrix = static_cast<int64_t>(job.channels) * job.channels;
  // Targets of an entry and of its mirror image: a matrix the user gives need not be symmetric.
  float target[4];
  float mirrored[4];
  // Not `target`, which is null for a target without pixels too.
  if (job.gram == nullptr) {
    add_parts(job.target, job.target_split, coord.sample, coord, job.target_scale, target);
#pragma unroll
    for (int q = 0; q < 4; ++q) mirrored[q] = target[q];
  } else {
    const float* gram = job.gram + coord.sample * matrix;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const bool counts = coord.counts(q, job.channels);
      const int64_t row = coord.row;
      const int64_t column = coord.column + q;
      target[q] = counts ? gram[row * job.channels + column] : 0.0f;
      mirrored[q] = counts ? gram[column * job.channels + row] : 0.0f;
    }
  }
  double loss = 0.0;
#pragma unroll 1
  for (int prediction = 0; prediction < job.predictions; ++prediction) {
    const int64_t sample = static_cast<int64_t>(prediction) * job.batch + coord.sample;
    float gram[4];
    float factor[4];
    add_parts(job.input, job.split, sample, coord, job.input_scale, gram);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const double d = static_cast<double>(gram[q] - target[q]);
      const double mirror = static_cast<double>(gram[q] - mirrored[q]);
      const bool diagonal = coord.row == coord.column + q;
      if (coord.counts(q, job.channels)) loss += style_entry(jobs.l1, d, mirror, diagonal);
      factor[q] = job.factor * static_cast<float>(style_entry_grad(jobs.l1, d, mirror));
    }
    if (job.factors != nullptr) store_symmetric(coord, factor, job.channels, job.factors + sample * matrix);
  }
  loss = sum_block<kStripThreads>(loss);
  if (threadIdx.x == 0) jobs.losses[blockIdx.x] = loss * job.weight;
}

}  // namespace ik::cuda
