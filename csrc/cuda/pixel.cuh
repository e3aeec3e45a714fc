// Building blocks of the pixel-loss kernels: how a call is cut into tiles, weights from masks, loads.
//
// Work split. A segment is a run of consecutive elements (common/op_args.h). A tile is a stretch of every segment
// in a range of segments of one sample, done by one block of 128 threads: `lanes` threads side by side along the
// segment, 128 / lanes rows of segments. A thread owns kVectors vectors of E elements at the same place in all
// segments of its row, so a mask shared by the channels is read once and stays in registers while they go by.
// E is 16 bytes of the widest tensor: every access of a warp covers consecutive 16-byte pieces. Longer runs per
// thread would leave half-filled 32-byte sectors in every store.
// Loads in flight per thread: kUnroll segments x kVectors x 2 tensors, 8 x 16 bytes. Where a sample is one segment
// (channels_last, C = 1) a thread takes two stretches of it instead.
// Tiles depend on the shape alone: same shape, same bits.
#pragma once

#include "common/pixel.h"
#include "cuda/vector.cuh"

namespace ik::cuda {

constexpr int kThreads = 128;
constexpr int kBlocks = 5;  // per multiprocessor: at most 96 registers, the most that compiles without spills
constexpr int kWarp = 32;
constexpr int kVectors = 2;
constexpr int kUnroll = 2;

enum class MaskType : int { none, f32, f16, bf16, f64, u8, boolean };
enum class Mode : int { map = 0, one_region = 1, two_regions = 2 };

template <Mode kMode>
constexpr int kRegions = kMode == Mode::two_regions ? 2 : 1;

// The map is fp32 whatever the images are, and its stores set the vector width.
template <typename P, typename T, Mode kMode>
constexpr int kElements = kMode == Mode::map || sizeof(P) == 4 || sizeof(T) == 4 ? 4 : 8;

struct Tiling {
  int64_t length;             // elements of a segment
  int64_t groups;             // groups of 8 in a segment
  int32_t segments;           // per sample
  int32_t segments_per_tile;
  int32_t tiles_along;        // per segment
  int32_t tiles_across;       // segment ranges per sample
  int32_t lanes;              // power of two, 2..128
  bool along;                 // kUnroll counts stretches of the only segment, not segments
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
  tiling.tiles_along = static_cast<int32_t>((length + extent - 1) / extent);
  // More segments per tile save mask reads and partial sums; stop while there are still blocks for every
  // multiprocessor of a large GPU several times over.
  const int64_t enough_tiles = 2048;
  int64_t per_tile = static_cast<int64_t>(kThreads / tiling.lanes) * kUnroll;
  const auto across = [&](int64_t n) { return (segments + n - 1) / n; };
  while (per_tile < segments &&
         (per_tile < 4 || (per_tile < 32 && samples * tiling.tiles_along * across(2 * per_tile) >= enough_tiles))) {
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
  bool aligned;  // whole vectors, each aligned to its size or 16 bytes, of at most 4 bytes an element
  bool shared;   // one plane for all segments of a sample
};

// A thread's share of one segment: kVectors vectors, `step` elements apart, the first at `start`.
struct Stretch {
  int64_t sample;
  int64_t segment;  // counted over the batch
  int64_t start;
  int32_t channel;  // segment within its sample
  int32_t left;     // elements of the segment from `start` on, clamped; <= 0 if there is nothing to do
  int32_t step;

  template <int E>
  __device__ int valid(int v) const {
    const int rest = left - v * step;
    return rest < 0 ? 0 : (rest < E ? rest : E);
  }
};

// What a thread works on, round by round.
struct Place {
  int64_t start;
  int32_t sample;
  int32_t first;   // segment in round 0
  int32_t last;    // one past the tile's last segment
  int32_t hop;     // segments between rounds
  int32_t rounds;  // the same for all threads of the block: shuffles must stay uniform
  int32_t lane;

  template <int E>
  __device__ Stretch stretch(const Tiling& tiling, int round, int u) const {
    Stretch s;
    s.sample = sample;
    s.channel = first + round * hop + (tiling.along ? 0 : u);
    s.segment = static_cast<int64_t>(sample) * tiling.segments + s.channel;
    s.step = tiling.lanes * E;
    s.start = start + (tiling.along ? u * kVectors * s.step : 0);
    const int64_t left = s.channel < last ? tiling.length - s.start : 0;
    s.left = static_cast<int>(left < kVectors * s.step ? left : kVectors * s.step);
    return s;
  }
};

template <int E>
IK_DEVICE Place locate(const Tiling& tiling) {
  Place place;
  const unsigned along = blockIdx.x % static_cast<unsigned>(tiling.tiles_along);
  const unsigned rest = blockIdx.x / static_cast<unsigned>(tiling.tiles_along);
  const int across = static_cast<int>(rest % static_cast<unsigned>(tiling.tiles_across));
  place.sample = static_cast<int>(rest / static_cast<unsigned>(tiling.tiles_across));
  place.lane = static_cast<int>(threadIdx.x) & (tiling.lanes - 1);
  const int extent = tiling.lanes * kVectors * E * (tiling.along ? kUnroll : 1);
  place.start = static_cast<int64_t>(along) * extent + place.lane * E;
  const int begin = across * tiling.segments_per_tile;
  const int end = begin + tiling.segments_per_tile;
  const int per_row = tiling.along ? 1 : kUnroll;
  place.last = end < tiling.segments ? end : tiling.segments;
  place.first = begin + static_cast<int>(threadIdx.x) / tiling.lanes * per_row;
  place.hop = kThreads / tiling.lanes * per_row;
  place.rounds = (place.last - begin + place.hop - 1) / place.hop;
  return place;
}

// Mask values of a stretch whose mask is laid out like the images and allows whole vectors.
template <typename M, int E>
IK_DEVICE void read_vectors(const MaskView& mask, int64_t base, const Stretch& s, float (&weight)[kVectors][E]) {
  const M* data = static_cast<const M*>(mask.data) + base + s.start;
  Pack<M, E> packs[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) load_pack_if(s.valid<E>(v) > 0, data + v * s.step, packs[v]);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (std::is_same_v<M, Half>) {
      Pack<BFloat16, E> other;
      memcpy(&other, &packs[v], sizeof(other));
      if (mask.type == MaskType::bf16) {
        unpack(other, weight[v]);
      } else {
        unpack(packs[v], weight[v]);
      }
    } else {
      unpack(packs[v], weight[v]);
    }
  }
}

// Any other mask, element by element: the single-channel mask of a channels_last image, odd sizes, double. The loop
// is kept short, as six types would fill the kernel with loads; the values wait in a column of shared memory that
// belongs to the thread alone.
template <typename M, int E>
IK_DEVICE void read_elements(const MaskView& mask, int64_t base, const Stretch& s, float* column) {
  const M* data = static_cast<const M*>(mask.data) + base;
#pragma unroll 1
  for (int v = 0; v < kVectors; ++v) {
    const int64_t element = s.start + v * s.step;
    int64_t index = element;
    int phase = 0;
    if (mask.repeat > 1) {
      // A 64-bit division costs several times a 32-bit one.
      index = element <= INT32_MAX ? static_cast<uint32_t>(element) / static_cast<uint32_t>(mask.repeat)
                                   : element / mask.repeat;
      phase = static_cast<int>(element - index * mask.repeat);
    }
    const int valid = s.valid<E>(v);
#pragma unroll 4
    for (int k = 0; k < E; ++k) {
      column[(v * E + k) * kThreads] = k < valid ? static_cast<float>(data[index]) : 0.0f;
      if (++phase >= mask.repeat) {
        phase = 0;
        ++index;
      }
    }
  }
}

// Mask values of a stretch, 1 without a mask, 0 beyond the segment's end. Mask type and alignment are the same for
// the whole grid, no branch on them diverges.
template <int E>
IK_DEVICE void load_mask(const MaskView& mask, const Stretch& s, float (&weight)[kVectors][E]) {
  const int64_t base = s.sample * mask.stride_n + s.channel * mask.stride_c;
  const MaskType type = mask.type;
  if (type == MaskType::none) {
#pragma unroll
    for (int i = 0; i < kVectors * E; ++i) weight[i / E][i % E] = i % E < s.valid<E>(i / E) ? 1.0f : 0.0f;
  } else if (mask.aligned) {
    if (type == MaskType::f32) {
      read_vectors<float>(mask, base, s, weight);
    } else if (type == MaskType::f16 || type == MaskType::bf16) {
      read_vectors<Half>(mask, base, s, weight);
    } else {
      read_vectors<uint8_t>(mask, base, s, weight);
    }
  } else {
    __shared__ float columns[kVectors * E * kThreads];
    float* column = columns + threadIdx.x;
    if (type == MaskType::f32) read_elements<float, E>(mask, base, s, column);
    if (type == MaskType::f16) read_elements<Half, E>(mask, base, s, column);
    if (type == MaskType::bf16) read_elements<BFloat16, E>(mask, base, s, column);
    if (type == MaskType::f64) read_elements<double, E>(mask, base, s, column);
    if (type == MaskType::u8 || type == MaskType::boolean) read_elements<uint8_t, E>(mask, base, s, column);
#pragma unroll
    for (int i = 0; i < kVectors * E; ++i) weight[i / E][i % E] = column[i * kThreads];
  }
  // A bool tensor viewed from other bytes is true for every byte but 0.
  if (type == MaskType::boolean) {
#pragma unroll
    for (int i = 0; i < kVectors * E; ++i) weight[i / E][i % E] = weight[i / E][i % E] != 0.0f ? 1.0f : 0.0f;
  }
}

// A stretch of an image, zeros beyond the segment's end.
template <bool kAligned, typename T, int E>
IK_DEVICE void load_values(const void* image, const Tiling& tiling, const Stretch& s, Pack<T, E> (&packs)[kVectors]) {
  const T* data = static_cast<const T*>(image) + s.segment * tiling.length + s.start;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kAligned) {
      load_pack_if(s.valid<E>(v) > 0, data + v * s.step, packs[v]);
    } else {
      load_pack_scalar(data + v * s.step, s.valid<E>(v), packs[v]);
    }
  }
}

// Both images in all stretches of a round: every load is issued before the first value is used.
template <bool kAligned, typename P, typename T, int E>
IK_DEVICE void load_round(const void* pred, const void* target, const Tiling& tiling, const Place& place, int round,
                          Pack<P, E> (&pred_packs)[kUnroll][kVectors], Pack<T, E> (&target_packs)[kUnroll][kVectors]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Stretch s = place.stretch<E>(tiling, round, u);
    load_values<kAligned>(pred, tiling, s, pred_packs[u]);
    load_values<kAligned>(target, tiling, s, target_packs[u]);
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
