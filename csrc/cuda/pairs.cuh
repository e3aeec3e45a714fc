// Building blocks of the kernels over neighbouring pixels (total_variation, inpainting_pixel): work split,
// images, packed signs.
//
// Work split. A thread owns a vec4, 4 pixels side by side, in kChannels channels that share a mask plane, and
// walks down the rows of a chunk: the row above stays in its registers, the pixel to the right comes from the
// next thread by a shuffle. `lanes` threads, a part of a warp, make a strip; what lies beside a strip is
// loaded by its first threads, one value each. No shared memory and no barrier before the sums. Only the rows
// around a chunk are read twice. Chunks depend on the shape alone: same shape, same bits.
//
// The element type of an image is an argument, not a template parameter: a uniform branch around all vec4s of
// a row costs less than nine copies of every kernel.
#pragma once

#include "common/pairs.h"
#include "cuda/pixel.cuh"

namespace ik::cuda {

constexpr int kVec4 = 4;
// Blocks per multiprocessor, as a cap on registers: 168 for three channels, which spill a little with 128.
template <int kChannels>
constexpr int kPairBlocks = kChannels == 3 ? 3 : 4;

// What is summed: pairs of an image, pairs of the composite of two, or those and the hole and valid terms.
enum class Terms : int { image, composite, losses };

// Kinds of signs: across, down, and of pred - target.
template <Terms kTerms>
constexpr int kSignKinds = kTerms == Terms::losses ? 3 : 2;

// The backward of the squared composite holds three rows of two images: it spills with 168.
template <Terms kTerms, int kChannels, bool kSquare>
constexpr int kPairBackwardBlocks =
    kTerms == Terms::composite && kChannels == 3 && kSquare ? 2 : kPairBlocks<kChannels>;

// How a call is cut into chunks.
struct Frame {
  int32_t channels;
  int32_t rows;
  int32_t width;  // in pixels
  bool whole;     // vec4s, all of them within the image
  int32_t lanes;  // power of two, 8..32
  int32_t log_lanes;
  int32_t chunk_rows;  // a multiple of 4
  Divider strips;      // of a row
  Divider chunks;      // of a strip
  Divider blocks;      // of a sample
  int32_t slots;       // strips of a block
  int32_t sample_slots;
  int32_t sign_rows;  // of 4 rows of pixels
  int32_t sign_vec4s;
};

// An image in NCHW or channels_last; null where there is none. Strides in bytes.
struct Image {
  char* data;
  int64_t sample;
  int64_t channel;
  int64_t row;
  int64_t pixel;
  ElementType type;
  bool vectors;      // vec4s in one or three loads, aligned to their size
  bool interleaved;  // with vectors: those of all channels are one run of elements
};

// What a thread works on.
struct PairCoord {
  int32_t sample;
  int32_t channel;   // the first
  int32_t channels;  // 0: nothing to do
  int32_t x;         // of the first pixel
  int32_t valid;     // pixels within the image, 0..4
  int32_t begin;     // rows
  int32_t end;
  int32_t lane;       // within the strip
  int32_t strip_x;    // of the strip's first pixel
  int32_t next_x;     // of the next strip's
  int32_t warp_lane;  // of the strip's first thread
  bool last;          // thread of the strip
  bool at_border;     // no pixel of the image is to the right

  // Where row `y` of the pixel at `column` is, in channel `channel` + c.
  __device__ char* in(const Image& image, int c, int y, int column) const {
    return image.data + sample * image.sample + static_cast<int64_t>(channel + c) * image.channel +
           y * image.row + column * image.pixel;
  }
};

template <int kChannels>
IK_DEVICE PairCoord locate_chunk(const Frame& frame) {
  PairCoord coord{};
  const uint32_t sample = frame.blocks.quotient(blockIdx.x);
  const uint32_t block = blockIdx.x - sample * frame.blocks.divisor;
  const uint32_t slot = block * frame.slots + (threadIdx.x >> frame.log_lanes);
  const uint32_t chunk = frame.strips.quotient(slot);
  const uint32_t group = frame.chunks.quotient(chunk);
  coord.sample = static_cast<int>(sample);
  coord.lane = static_cast<int>(threadIdx.x) & (frame.lanes - 1);
  coord.warp_lane = static_cast<int>(threadIdx.x) % kWarp - coord.lane;
  // The last block of a sample may have strips too many, which lie outside of the image.
  const bool idle = slot >= static_cast<uint32_t>(frame.sample_slots);
  const int strip = idle ? static_cast<int>(frame.strips.divisor) + 1
                         : static_cast<int>(slot - chunk * frame.strips.divisor);
  coord.strip_x = strip * frame.lanes * kVec4;
  coord.next_x = coord.strip_x + frame.lanes * kVec4;
  coord.x = coord.strip_x + coord.lane * kVec4;
  coord.last = coord.lane == frame.lanes - 1;
  coord.at_border = coord.x + kVec4 >= frame.width;
  if (idle) return coord;
  const int left = frame.width - coord.x;
  coord.valid = left < 0 ? 0 : (left < kVec4 ? left : kVec4);
  coord.channel = static_cast<int>(group) * kChannels;
  coord.channels = frame.channels - coord.channel;
  coord.begin = static_cast<int>(chunk - group * frame.chunks.divisor) * frame.chunk_rows;
  const int below = frame.rows - coord.begin;
  coord.end = coord.begin + (below < frame.chunk_rows ? below : frame.chunk_rows);
  return coord;
}

// The value of the strip's thread before or after this one; the first or last thread gets `beside`.
IK_DEVICE float from_left(const PairCoord& coord, float value, float beside) {
  const float other = __shfl_up_sync(0xffffffffu, value, 1);
  return coord.lane == 0 ? beside : other;
}
IK_DEVICE float from_right(const PairCoord& coord, float value, float beside) {
  const float other = __shfl_down_sync(0xffffffffu, value, 1);
  return coord.last ? beside : other;
}
IK_DEVICE float from_lane(const PairCoord& coord, float value, int lane) {
  return __shfl_sync(0xffffffffu, value, coord.warp_lane + lane);
}

// Quads of kChannels channels as they came from memory: 4 words each, 2 of a half type.
template <int kChannels>
struct RawVec4s {
  uint32_t words[kChannels * kVec4];
};

// Channels beyond `channels` stay as they are, pixels beyond `valid` as well or become 0.
template <typename T, int kChannels>
IK_DEVICE void load_vec4s_of(const Image& image, const char* at, int channels, int valid,
                             RawVec4s<kChannels>& raw) {
  constexpr int kWords = Pack<T, kVec4>::kWords;
  // In channels_last the vec4s of all channels may be one run of elements.
  const int64_t step = image.interleaved ? 4 * kWords : image.channel;
  if (valid == 0) return;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    if (c >= channels) continue;
    Pack<T, kVec4> pack;
    const T* from = reinterpret_cast<const T*>(at + c * step);
    if (image.vectors) {
      load_words<4 * kWords, true>(from, pack.words);
    } else {
      load_pack_each(from, valid, pack, image.pixel / static_cast<int>(sizeof(T)));
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) raw.words[c * kWords + i] = pack.words[i];
  }
}

template <int kChannels>
IK_DEVICE void load_vec4s(const Image& image, const char* at, int channels, int valid,
                          RawVec4s<kChannels>& raw) {
  if (image.type == ElementType::f32) {
    load_vec4s_of<float>(image, at, channels, valid, raw);
  } else {
    load_vec4s_of<Half>(image, at, channels, valid, raw);
  }
}

template <int kChannels>
IK_DEVICE void unpack_vec4s(const Image& image, const RawVec4s<kChannels>& raw,
                            float (&values)[kChannels][kVec4]) {
  const bool interleaved = kChannels > 1 && image.interleaved;
  with_image_type(image.type, [&](auto type) {
    using T = typename decltype(type)::type;
    Pack<T, kChannels * kVec4> pack;
#pragma unroll
    for (int i = 0; i < pack.kWords; ++i) pack.words[i] = raw.words[i];
    float flat[kChannels * kVec4];
    unpack(pack, flat);
#pragma unroll
    for (int i = 0; i < kChannels * kVec4; ++i) {
      const int c = i / kVec4;
      const int k = i % kVec4;
      values[c][k] = interleaved ? flat[k * kChannels + c] : flat[i];
    }
  });
}

IK_DEVICE uint32_t load_element(ElementType type, const char* address) {
  return type == ElementType::f32 ? element_bits(reinterpret_cast<const float*>(address))
                                  : element_bits(reinterpret_cast<const Half*>(address));
}

IK_DEVICE float element_value(ElementType type, uint32_t bits) {
  if (type == ElementType::f32) return bits_to_float(bits);
  if (type == ElementType::bf16) return bits_to_float(bits << 16);
  return static_cast<float>(Half(static_cast<uint16_t>(bits), Half::from_bits()));
}

template <int kChannels>
IK_DEVICE void store_vec4s(const Image& image, char* at, int channels, int valid,
                           const float (&values)[kChannels][kVec4]) {
  const bool interleaved = kChannels > 1 && image.interleaved;
  with_image_type(image.type, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t step = interleaved ? kVec4 * static_cast<int64_t>(sizeof(T)) : image.channel;
    const int64_t pixel = image.pixel / static_cast<int>(sizeof(T));
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      float vec4[kVec4];
#pragma unroll
      for (int k = 0; k < kVec4; ++k) {
        const int flat = c * kVec4 + k;
        vec4[k] = interleaved ? values[flat % kChannels][flat / kChannels] : values[c][k];
      }
      const int count = c < channels ? valid : 0;
      store_values(reinterpret_cast<T*>(at + c * step), vec4, count, image.vectors, pixel);
    }
  });
}

// mask * weighed + (1 - mask) * other. The same rounding wherever a pixel's composite is formed, so that
// equal pixels stay equal: no contraction is left to the compiler.
IK_DEVICE float composite_value(float mask, float weighed, float other) {
  const float rest = 1.0f - mask;
  const float part = rest == 0.0f ? 0.0f : fmaf(rest, other, 0.0f);
  return mask == 0.0f ? part : fmaf(mask, weighed, part);
}

// Signs of 4 x 4 pixels of a channel in a word: a byte a row, two bits a pixel, 1 + sign (ops/_pairs.py). A
// byte grows as 2^23 + byte in a float and is taken apart as floats: that leaves half of the work to the
// float units, which are twice as many as those for bits.
constexpr uint32_t kNoSigns = 0x55555555u;
constexpr float kNoSignsByte = 8388608.0f + 85.0f;

IK_DEVICE void add_sign(bool counts, float d, int place, float& byte) {
  if (counts && fabsf(d) > 0.0f) byte += copysignf(static_cast<float>(1 << (2 * place)), d);
}

// Row `row` of the word becomes `byte`.
IK_DEVICE uint32_t insert_signs(uint32_t word, float byte, int row) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, float_to_bits(byte), (0x3210u & ~(0xfu << (4 * row))) | 4u << (4 * row));
#else
  return (word & ~(0xffu << (8 * row))) | (float_to_bits(byte) & 0xffu) << (8 * row);
#endif
}

// +1, 0 or -1, from a word shifted so that the wanted row is its lowest byte.
IK_DEVICE float sign_at(uint32_t row, int place) {
  const int exponent = 23 - 2 * place;  // the unit of the field is then 1
  const uint32_t bits = static_cast<uint32_t>(127 + exponent) << 23 | (row & 3u << (2 * place));
  return bits_to_float(bits) - (static_cast<float>(1 << exponent) + 1.0f);
}

// Where the words of signs of a chunk's first 4 rows are: of this thread's first channel and the first kind.
template <Terms kTerms, typename Word>
IK_DEVICE Word* sign_words(Word* signs, const Frame& frame, const PairCoord& coord) {
  const int64_t plane = static_cast<int64_t>(coord.sample) * frame.channels + coord.channel;
  const int64_t row = plane * frame.sign_rows + coord.begin / kVec4;
  return signs + row * kSignKinds<kTerms> * frame.sign_vec4s + coord.x / kVec4;
}

}  // namespace ik::cuda
