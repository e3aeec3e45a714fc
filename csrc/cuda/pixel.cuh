// Building blocks of the pixel-loss kernels: how a call is cut into tiles, mask weights, forward, finalisation,
// backward. The formulas are in common/pixel.h.
//
// Work split. A segment is a run of consecutive elements (common/op_args.h). A tile is a stretch of every segment
// in a range of segments of one sample, done by one block of 128 threads: `lanes` threads side by side along the
// segment, 128 / lanes rows of segments. A thread owns V vectors of E elements at the same place in all segments of
// its row, so a mask shared by the channels is read once and stays in registers while the channels go by.
// E is 16 bytes of the widest tensor: every warp access covers consecutive 16-byte pieces. Wider runs per thread
// would leave half-filled 32-byte sectors in every store.
// Loads in flight per thread: kUnroll segments x V vectors x 2 tensors = 8 x 16 bytes.
// Tiles depend on the shape alone: same shape, same bits.
#pragma once

#include "common/pixel.h"
#include "cuda/vector.cuh"

namespace ik::cuda {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kVectors = 2;  // V
constexpr int kUnroll = 2;   // segments loaded together by one thread
constexpr int kFinalThreads = 1024;

enum class MaskType : int { none, f32, f16, bf16, f64, u8, boolean };
enum class Mode : int { one_region = 1, two_regions = 2, map = 0 };

// The map is fp32 whatever the images are, and sets the vector width.
template <typename P, typename T, bool kMap = false>
constexpr int kElements = kMap || sizeof(P) == 4 || sizeof(T) == 4 ? 4 : 8;

struct Tiling {
  int64_t length;            // elements of a segment
  int64_t groups;            // groups of 8 in a segment
  int32_t segments;          // per sample
  int32_t segments_per_tile;
  int32_t tiles_along;       // per segment
  int32_t tiles_across;      // segment ranges per sample
  int32_t lanes;             // power of two, 2..128

  int64_t tiles_per_sample() const { return static_cast<int64_t>(tiles_along) * tiles_across; }
};

static inline Tiling make_tiling(int64_t samples, int64_t segments, int64_t length, int elements) {
  Tiling tiling{};
  tiling.length = length;
  tiling.groups = (length + 7) / 8;
  tiling.segments = static_cast<int32_t>(segments);
  const int64_t per_thread = static_cast<int64_t>(elements) * kVectors;
  tiling.lanes = 2;
  while (tiling.lanes < kThreads && tiling.lanes * per_thread < length) tiling.lanes *= 2;
  const int64_t extent = tiling.lanes * per_thread;
  tiling.tiles_along = static_cast<int32_t>((length + extent - 1) / extent);
  // More segments per tile save mask reads and partial sums; stop while there are still blocks for every
  // multiprocessor of a large GPU several times over.
  const int64_t enough_tiles = 2048;
  int64_t per_tile = static_cast<int64_t>(kThreads / tiling.lanes) * kUnroll;
  auto across = [&](int64_t n) { return (segments + n - 1) / n; };
  while (per_tile < segments && (per_tile < 4 || (per_tile < 32 && samples * tiling.tiles_along *
                                                                           across(2 * per_tile) >= enough_tiles))) {
    per_tile *= 2;
  }
  tiling.segments_per_tile = static_cast<int32_t>(per_tile);
  tiling.tiles_across = static_cast<int32_t>(across(per_tile));
  return tiling;
}

// Element i of segment (n, c) has the weight data[n * stride_n + c * stride_c + i / repeat].
struct MaskView {
  const void* data;
  int64_t stride_n;
  int64_t stride_c;
  int32_t repeat;
  MaskType type;
  bool aligned;  // whole vectors, each aligned to its size (to 16 bytes if larger)
  bool shared;   // one plane for all segments of a sample
};

// What a thread works on.
struct Place {
  int64_t sample;
  int64_t start;       // of the tile, in its segment
  int32_t first;       // segment of this thread in round 0
  int32_t last;        // one past the tile's last segment
  int32_t row_step;    // segments between rounds
  int32_t rounds;      // the same for all threads of the block, so that shuffles stay uniform
  int32_t lane;
  int32_t lanes;
  int32_t remaining;   // elements of the segment from `start` on, as far as this tile goes

  // Offset from `start` of vector v, and how many of its elements exist.
  template <int E>
  __device__ int offset(int v) const {
    return (v * lanes + lane) * E;
  }
  template <int E>
  __device__ int valid(int v) const {
    const int left = remaining - offset<E>(v);
    return left < 0 ? 0 : (left < E ? left : E);
  }
};

template <int E>
IK_DEVICE Place locate(const Tiling& tiling) {
  Place place;
  const unsigned along = blockIdx.x % static_cast<unsigned>(tiling.tiles_along);
  const unsigned rest = blockIdx.x / static_cast<unsigned>(tiling.tiles_along);
  const unsigned across = rest % static_cast<unsigned>(tiling.tiles_across);
  place.sample = rest / static_cast<unsigned>(tiling.tiles_across);
  place.lanes = tiling.lanes;
  place.lane = static_cast<int>(threadIdx.x) & (tiling.lanes - 1);
  const int row = static_cast<int>(threadIdx.x) / tiling.lanes;
  const int extent = tiling.lanes * kVectors * E;
  place.start = static_cast<int64_t>(along) * extent;
  const int64_t left = tiling.length - place.start;
  place.remaining = left < extent ? static_cast<int>(left) : extent;
  const int begin = static_cast<int>(across) * tiling.segments_per_tile;
  const int end = begin + tiling.segments_per_tile;
  place.last = end < tiling.segments ? end : tiling.segments;
  place.first = begin + row * kUnroll;
  place.row_step = kThreads / tiling.lanes * kUnroll;
  place.rounds = (place.last - begin + place.row_step - 1) / place.row_step;
  return place;
}

template <typename M, int E>
IK_DEVICE void read_weights(const MaskView& mask, int64_t base, const Place& place, float (&weight)[kVectors][E]) {
  const M* data = static_cast<const M*>(mask.data) + base;
  if (mask.aligned) {
    Pack<M, E> packs[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (place.valid<E>(v) > 0) {
        load_pack(data + place.start + place.offset<E>(v), packs[v]);
      } else {
#pragma unroll
        for (int i = 0; i < Pack<M, E>::kWords; ++i) packs[v].words[i] = 0;
      }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) unpack(packs[v], weight[v]);
    return;
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    // One division a vector, then counting: channels_last keeps the `repeat` channels of a pixel together.
    // A 64-bit division costs about five times a 32-bit one.
    const int64_t element = place.start + place.offset<E>(v);
    int64_t index = element;
    if (mask.repeat > 1) {
      index = element <= INT32_MAX ? static_cast<uint32_t>(element) / static_cast<uint32_t>(mask.repeat)
                                   : element / mask.repeat;
    }
    int32_t phase = static_cast<int32_t>(element - index * mask.repeat);
    const int valid = place.valid<E>(v);
#pragma unroll
    for (int k = 0; k < E; ++k) {
      weight[v][k] = k < valid ? static_cast<float>(data[index]) : 0.0f;
      if (++phase == mask.repeat) {
        phase = 0;
        ++index;
      }
    }
  }
}

// Region weights of this thread's elements in a segment: (mask) for one region, (hole, valid) for two. 0 beyond
// the end of the segment. The type of the mask is the same for the whole grid, so the switch does not diverge.
template <int R, int E>
IK_DEVICE void load_weights(const MaskView& mask, bool mask_is_hole, const Place& place, int segment,
                            float (&weight)[R][kVectors][E]) {
  const int64_t base = place.sample * mask.stride_n + segment * mask.stride_c;
  float(&values)[kVectors][E] = weight[0];
  switch (mask.type) {
    case MaskType::none:
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int k = 0; k < E; ++k) values[v][k] = k < place.valid<E>(v) ? 1.0f : 0.0f;
      }
      break;
    case MaskType::f32:
      read_weights<float>(mask, base, place, values);
      break;
    case MaskType::f16:
      read_weights<Half>(mask, base, place, values);
      break;
    case MaskType::bf16:
      read_weights<BFloat16>(mask, base, place, values);
      break;
    case MaskType::f64:
      read_weights<double>(mask, base, place, values);
      break;
    case MaskType::u8:
    case MaskType::boolean:
      read_weights<uint8_t>(mask, base, place, values);
      // A bool viewed from other bytes is true for every non-zero byte.
      if (mask.type == MaskType::boolean) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
          for (int k = 0; k < E; ++k) values[v][k] = values[v][k] != 0.0f ? 1.0f : 0.0f;
        }
      }
      break;
  }
  if constexpr (R == 2) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int k = 0; k < E; ++k) {
        const float m = weight[0][v][k];
        const float rest = k < place.valid<E>(v) ? 1.0f - m : 0.0f;
        weight[0][v][k] = mask_is_hole ? m : rest;
        weight[1][v][k] = mask_is_hole ? rest : m;
      }
    }
  }
}

// This thread's elements of one segment, zeros beyond its end.
template <typename T, int E>
IK_DEVICE void load_values(const T* segment, const Place& place, bool active, bool aligned,
                           Pack<T, E> (&packs)[kVectors]) {
  const T* tile = segment + place.start;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int valid = active ? place.valid<E>(v) : 0;
    if (aligned) {
      if (valid > 0) {
        load_pack(tile + place.offset<E>(v), packs[v]);
      } else {
#pragma unroll
        for (int i = 0; i < Pack<T, E>::kWords; ++i) packs[v].words[i] = 0;
      }
    } else {
      load_pack_scalar(tile + place.offset<E>(v), valid, packs[v]);
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
