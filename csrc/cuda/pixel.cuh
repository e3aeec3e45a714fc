// Building blocks of the pixel-loss kernels: tiles of a call, weights from masks, loads, and the loop.
//
// One kernel shape serves masked_l1, hole_valid and feature_distance: L layers, each k predictions of N
// samples compared with one target, in one or two regions. Sample j N + n of the predictions belongs to
// sample n of the target. The blocks of all layers form one grid.
//
// Work split. A segment is a run of consecutive elements: a channel plane in NCHW, a sample in channels_last
// (common/pixel_shape.h). A tile is a piece of every segment in a range of segments of one target sample,
// done by one block of 128 threads: `lanes` threads side by side along the segment, 128 / lanes rows of
// segments. A thread owns kVectors vectors of E elements at the same place in all segments of its row, so a
// mask shared by the channels is read once and kept while the channels go by. It loads its part of the target
// once and then goes over the predictions. E elements are 16 bytes of the widest tensor: a warp access covers
// consecutive 16-byte pieces. Longer runs per thread would leave half-filled 32-byte sectors in every store.
// Loads in flight per thread: kUnroll segments x kVectors x 2 tensors = 8 of 16 bytes. Where a sample is one
// segment (channels_last, C = 1) a thread takes kUnroll pieces of it instead. Tiles depend on the shape
// alone: same shape, same bits.
#pragma once

#include "common/pixel.h"
#include "cuda/vector.cuh"

namespace ik::cuda {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kVectors = 2;
constexpr int kUnroll = 2;

enum class ElementType : int { none, f32, f16, bf16, f64, u8 };
// Elements of a vector: 16 bytes of the wider tensor.
template <typename P, typename T>
constexpr int kElements = sizeof(P) == 4 || sizeof(T) == 4 ? 4 : 8;

static inline int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

static inline int log2_up(int64_t n) {
  int log = 0;
  while ((int64_t{1} << log) < n) ++log;
  return log;
}

// Division of numbers below 2^31 by a constant of the launch: 3 instructions instead of 20.
struct Divider {
  uint32_t divisor;
  uint32_t magic;
  uint32_t shift;

  __device__ uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>((static_cast<uint64_t>(n) * magic) >> 32) + n) >> shift;
  }
};

static inline Divider make_divider(int64_t divisor) {
  Divider d{static_cast<uint32_t>(divisor), 0, static_cast<uint32_t>(log2_up(divisor))};
  const uint64_t rest = (uint64_t{1} << d.shift) - d.divisor;
  d.magic = static_cast<uint32_t>((rest << 32) / d.divisor + 1);
  return d;
}

struct Tiling {
  int64_t length;    // elements of a segment
  int64_t groups;    // groups of 8 in a segment
  int32_t segments;  // per sample
  int32_t segments_per_tile;
  Divider tiles_along;   // per segment
  Divider tiles_across;  // segment ranges per sample
  int32_t lanes;         // power of two, 2..128
  int32_t log_lanes;
  int32_t rounds;  // of a tile, over its segments: one number for all threads, as shuffles must stay uniform
  bool along;      // kUnroll counts chunks of the only segment, not segments

  int64_t tiles_per_sample() const {
    return static_cast<int64_t>(tiles_along.divisor) * tiles_across.divisor;
  }
};

static inline Tiling make_tiling(int64_t samples, int64_t segments, int64_t length, int elements) {
  Tiling tiling{};
  tiling.length = length;
  tiling.groups = (length + 7) / 8;
  tiling.segments = static_cast<int32_t>(segments);
  tiling.along = segments == 1;
  const int64_t per_thread = static_cast<int64_t>(elements) * kVectors * (tiling.along ? kUnroll : 1);
  tiling.lanes = 2;
  while (tiling.lanes < kThreads && tiling.lanes * per_thread < length) tiling.lanes *= 2;
  const int64_t extent = tiling.lanes * per_thread;
  const int64_t along = ceil_div(length, extent);
  // More segments per tile save mask reads and partial sums, more tiles fill the GPU: two per multiprocessor
  // of a large one (132) before the channels of an RGB image are kept together, many more beyond that.
  int64_t per_tile = static_cast<int64_t>(kThreads / tiling.lanes) * kUnroll;
  const auto tiles = [&](int64_t n) { return samples * along * ceil_div(segments, n); };
  while (per_tile < segments && per_tile < 32 && tiles(2 * per_tile) >= (per_tile < 4 ? 264 : 2048)) {
    per_tile *= 2;
  }
  tiling.segments_per_tile = static_cast<int32_t>(per_tile);
  const int64_t at_once = kThreads / tiling.lanes * (tiling.along ? 1 : kUnroll);
  tiling.rounds = static_cast<int32_t>(ceil_div(per_tile < segments ? per_tile : segments, at_once));
  tiling.log_lanes = log2_up(tiling.lanes);
  tiling.tiles_along = make_divider(along);
  tiling.tiles_across = make_divider(ceil_div(segments, per_tile));
  return tiling;
}

// Element i of segment (n, c) has the weight data[n * stride_n + c * stride_c + i / repeat].
struct MaskView {
  const void* data;
  int64_t stride_n;
  int64_t stride_c;
  int32_t repeat;
  ElementType type;
  float cap;     // of u8: mask_cap in arguments.cuh
  bool aligned;  // whole vectors, each aligned to its size or 16 bytes, of at most 4 bytes an element
  bool shared;   // one plane for all segments of a sample
};

constexpr int kMaxLayers = 8;

// One layer of a launch.
struct PixelLayer {
  Tiling tiling;  // over the samples of the target
  MaskView mask;
  const void* input;   // k predictions, [k N, segments, length]
  const void* target;  // [N, segments, length]
  uint16_t* signs;     // [k N, segments, groups] or null; l1
  int64_t sign_words;  // in the groups, and in the whole tensor, which channels_last does not fill
  int64_t sign_words_allocated;
  void* grad_input;        // [k N, segments, length] or null
  void* grad_target;       // [N, segments, length] or null, only with one prediction
  int64_t batch_segments;  // of N samples
  int32_t batch;           // N
  int32_t predictions;     // k
  int32_t scale_row;       // the layer's first row in the scales
  uint32_t first_block;    // of the launch
  uint32_t blocks;
  bool mask_per_prediction;  // the mask has k N samples
  bool aligned;              // images and gradients allow whole vectors
};

struct PixelArgs {
  PixelLayer layer[kMaxLayers];
  void* partials;        // forward: Partial<R> of every block
  const float* grad[2];  // backward: scalars, one per region; null = the region contributes nothing
  const float* scale;    // backward: [rows, R]
  Penalty penalty;
  float param;
  int32_t count;      // of layers
  bool mask_is_hole;  // of two regions
  bool per_sample;    // a row of the scales belongs to a sample, not to a layer
};

// A thread's piece of one segment: kVectors vectors, `step` elements apart, the first at `start`.
struct Chunk {
  int64_t sample;
  int64_t segment;  // counted over the batch
  int64_t start;
  int32_t channel;  // segment within its sample
  int32_t left;     // elements of the segment from `start` on, at most 2^31 - 1; <= 0: nothing to do
  int32_t step;

  template <int E>
  __device__ int valid(int v) const {
    const int rest = left - v * step;
    return rest < 0 ? 0 : (rest < E ? rest : E);
  }
};

// What a thread works on, round by round.
struct Coord {
  int64_t start;
  int32_t left;
  int32_t sample;
  int32_t first;  // segment in round 0
  int32_t last;   // one past the tile's last segment
  int32_t hop;    // segments between rounds
  int32_t lane;

  template <int E>
  __device__ Chunk chunk(const Tiling& tiling, int round, int u) const {
    Chunk s;
    s.sample = sample;
    s.channel = first + round * hop + (tiling.along ? 0 : u);
    s.segment = static_cast<int64_t>(sample) * tiling.segments + s.channel;
    s.step = tiling.lanes * E;
    const int skipped = tiling.along ? u * kVectors * s.step : 0;
    s.start = start + skipped;
    s.left = s.channel < last ? left - skipped : 0;
    return s;
  }
};

// `block` counts over the tiles of one tensor.
template <int E>
IK_DEVICE Coord locate(const Tiling& tiling, uint32_t block) {
  Coord coord;
  const uint32_t rest = tiling.tiles_along.quotient(block);
  const uint32_t along = block - rest * tiling.tiles_along.divisor;
  const uint32_t sample = tiling.tiles_across.quotient(rest);
  const uint32_t across = rest - sample * tiling.tiles_across.divisor;
  coord.sample = static_cast<int>(sample);
  coord.lane = static_cast<int>(threadIdx.x) & (tiling.lanes - 1);
  const int extent = tiling.lanes * kVectors * E * (tiling.along ? kUnroll : 1);
  coord.start = static_cast<int64_t>(along) * extent + coord.lane * E;
  const int64_t left = tiling.length - coord.start;
  coord.left = static_cast<int>(left < INT32_MAX ? left : INT32_MAX);
  const int begin = static_cast<int>(across) * tiling.segments_per_tile;
  const int end = begin + tiling.segments_per_tile;
  const int per_row = tiling.along ? 1 : kUnroll;
  coord.last = end < tiling.segments ? end : tiling.segments;
  coord.first = begin + (static_cast<int>(threadIdx.x) >> tiling.log_lanes) * per_row;
  coord.hop = (kThreads >> tiling.log_lanes) * per_row;
  return coord;
}

// A thread's own mask values, in shared memory: the code that reads masks (five types, aligned or not) then
// stands in a kernel once, in a loop, instead of in every unrolled chunk, which halves the code and saves a
// dozen registers. No other thread looks at them, so no barrier is needed. Groups of four of all threads lie
// side by side: no bank conflicts.
template <int E>
struct Weights {
  float vec4[kUnroll][kVectors * E / 4][kThreads][4];

  __device__ __forceinline__ float& at(int u, int v, int k) {
    const int i = v * E + k;
    return vec4[u][i / 4][threadIdx.x][i % 4];
  }
};

// Mask values of a chunk whose mask is laid out like the images and allows whole vectors.
template <typename M, int E>
IK_DEVICE void read_vectors(const MaskView& mask, int64_t base, const Chunk& s, int u, Weights<E>& weights) {
  const M* data = static_cast<const M*>(mask.data) + base + s.start;
  Pack<M, E> packs[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) load_pack_if(s.valid<E>(v) > 0, data + v * s.step, packs[v]);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float values[E];
    unpack(packs[v], values);
    if constexpr (std::is_same_v<M, Half>) {
      Pack<BFloat16, E> other;
      memcpy(&other, &packs[v], sizeof(other));
      if (mask.type == ElementType::bf16) unpack(other, values);
    }
#pragma unroll
    for (int k = 0; k < E; ++k) {
      weights.at(u, v, k) = std::is_same_v<M, uint8_t> ? min_(values[k], mask.cap) : values[k];
    }
  }
}

// Calls body(Type<T>()) for an image's type: a uniform branch.
template <typename Body>
IK_DEVICE void with_image_type(ElementType type, const Body& body) {
  if (type == ElementType::f16) {
    body(Type<Half>());
  } else if (type == ElementType::bf16) {
    body(Type<BFloat16>());
  } else {
    body(Type<float>());
  }
}

template <typename M, int K>
IK_DEVICE void gather_as(const void* data, const int64_t (&index)[K], float (&values)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = static_cast<float>(static_cast<const M*>(data)[index[k]]);
}

// Elements of a type known at run time. One branch for all of them: the loads are in flight together.
template <int K>
IK_DEVICE void gather(const void* data, ElementType type, float cap, const int64_t (&index)[K],
                      float (&values)[K]) {
  switch (type) {
    case ElementType::f32:
      return gather_as<float>(data, index, values);
    case ElementType::f16:
      return gather_as<Half>(data, index, values);
    case ElementType::bf16:
      return gather_as<BFloat16>(data, index, values);
    case ElementType::f64:
      return gather_as<double>(data, index, values);
    case ElementType::u8:
      gather_as<uint8_t>(data, index, values);
#pragma unroll
      for (int k = 0; k < K; ++k) values[k] = min_(values[k], cap);
      return;
    default:
#pragma unroll
      for (int k = 0; k < K; ++k) values[k] = 1.0f;
  }
}

// Any other mask, element by element: the single-channel mask of a channels_last image, odd sizes, double.
template <int E>
IK_DEVICE void read_elements(const MaskView& mask, int64_t base, const Chunk& s, int u, Weights<E>& weights) {
  constexpr int kVec4s = E / 4;
#pragma unroll 1
  for (int q = 0; q < kVectors * kVec4s; ++q) {
    const int offset = q / kVec4s * s.step + q % kVec4s * 4;
    const int valid = s.left - offset;
    float values[4] = {};
    if (valid > 0) {
      const int64_t element = s.start + offset;
      int64_t next = element;
      int phase = 0;
      if (mask.repeat > 1) {
        // A 64-bit division costs several times a 32-bit one.
        next = element <= INT32_MAX ? static_cast<uint32_t>(element) / static_cast<uint32_t>(mask.repeat)
                                    : element / mask.repeat;
        phase = static_cast<int>(element - next * mask.repeat);
      }
      next += base;
      int64_t index[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        index[k] = k < valid ? next : index[0];
        if (++phase >= mask.repeat) {
          phase = 0;
          ++next;
        }
      }
      gather(mask.data, mask.type, mask.cap, index, values);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) weights.vec4[u][q][threadIdx.x][k] = k < valid ? values[k] : 0.0f;
  }
}

// Mask values of chunk u: 1 without a mask, 0 beyond the segment's end. Mask type and alignment are the
// same for the whole grid, no branch on them diverges.
template <int E>
IK_DEVICE void load_mask(const MaskView& mask, const Chunk& s, int u, Weights<E>& weights) {
  const int64_t base = s.sample * mask.stride_n + s.channel * mask.stride_c;
  const ElementType type = mask.type;
  if (type == ElementType::none) {
#pragma unroll
    for (int i = 0; i < kVectors * E; ++i) {
      weights.at(u, i / E, i % E) = i % E < s.valid<E>(i / E) ? 1.0f : 0.0f;
    }
  } else if (mask.aligned) {
    if (type == ElementType::f32) {
      read_vectors<float>(mask, base, s, u, weights);
    } else if (type == ElementType::f16 || type == ElementType::bf16) {
      read_vectors<Half>(mask, base, s, u, weights);
    } else {
      read_vectors<uint8_t>(mask, base, s, u, weights);
    }
  } else {
    read_elements(mask, base, s, u, weights);
  }
}

// A chunk of an image, zeros beyond the segment's end.
template <bool kAligned, typename T, int E>
IK_DEVICE void load_values(const void* image, const Tiling& tiling, const Chunk& s,
                           Pack<T, E> (&packs)[kVectors]) {
  const T* data = static_cast<const T*>(image) + s.segment * tiling.length + s.start;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kAligned) {
      load_pack_if(s.valid<E>(v) > 0, data + v * s.step, packs[v]);
    } else {
      load_pack_each(data + v * s.step, s.valid<E>(v), packs[v]);
    }
  }
}

// Job of this block in a launch whose jobs own consecutive ranges of blocks, starting at `first_block`.
template <typename Jobs>
IK_DEVICE int find_job(const Jobs& jobs, int count) {
  int i = 0;
  while (i + 1 < count && blockIdx.x >= jobs[i + 1].first_block) ++i;
  return i;
}

// The chunk of prediction `prediction` that belongs to a chunk of the target.
template <int E>
IK_DEVICE Chunk input_chunk(const PixelLayer& layer, const Coord& coord, int round, int u, int prediction) {
  Chunk chunk = coord.chunk<E>(layer.tiling, round, u);
  chunk.segment += prediction * layer.batch_segments;
  return chunk;
}

// The values of `images` in all chunks of a round; every load is issued before the first value is used.
template <typename T, int E>
IK_DEVICE void load_images(const PixelLayer& layer, const void* images, const Coord& coord, int round,
                           int prediction, Pack<T, E> (&packs)[kUnroll][kVectors]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Chunk chunk = input_chunk<E>(layer, coord, round, u, prediction);
    if (layer.aligned) {
      load_values<true>(images, layer.tiling, chunk, packs[u]);
    } else {
      load_values<false>(images, layer.tiling, chunk, packs[u]);
    }
  }
}

// The loop of every pixel kernel. `work` is what one of them does with a block's part of a layer:
//   load_target(round)             starts the loads of the target, which all predictions share
//   load_input(round, prediction)  starts the loads of one prediction, or of its signs
//   use_mask(chunk, u)             after the mask of chunk u was read into `weights`
//   use(chunk, u, mask_u)          one chunk; its weights are those of chunk mask_u
// Each mask value is read as rarely as the shape of the mask allows, and after the loads of the images, so
// that waiting for the mask overlaps with waiting for the images.
template <int E, typename Work>
IK_DEVICE void for_chunks(const PixelLayer& layer, const Coord& coord, Weights<E>& weights, Work& work) {
  const MaskView& mask = layer.mask;
#pragma unroll 1
  for (int round = 0; round < layer.tiling.rounds; ++round) {
    work.load_target(round);
#pragma unroll 1
    for (int prediction = 0; prediction < layer.predictions; ++prediction) {
      work.load_input(round, prediction);
      if (layer.mask_per_prediction || (prediction == 0 && (round == 0 || !mask.shared))) {
#pragma unroll 1
        for (int u = 0; u < (mask.shared ? 1 : kUnroll); ++u) {
          Chunk chunk = input_chunk<E>(layer, coord, round, u, prediction);
          if (layer.mask_per_prediction) chunk.sample += static_cast<int64_t>(prediction) * layer.batch;
          load_mask(mask, chunk, u, weights);
          work.use_mask(chunk, u);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        work.use(input_chunk<E>(layer, coord, round, u, prediction), u, mask.shared ? 0 : u);
      }
    }
  }
}

// Calls `body` with the penalty as a compile-time constant; the branch is uniform.
template <bool kL1, typename Body>
IK_DEVICE void with_penalty(Penalty penalty, const Body& body) {
  if constexpr (kL1) {
    body(std::integral_constant<Penalty, Penalty::l1>());
  } else if (penalty == Penalty::l2) {
    body(std::integral_constant<Penalty, Penalty::l2>());
  } else if (penalty == Penalty::charbonnier) {
    body(std::integral_constant<Penalty, Penalty::charbonnier>());
  } else {
    body(std::integral_constant<Penalty, Penalty::huber>());
  }
}

}  // namespace ik::cuda
