// Building blocks of the kernels over neighbouring pixels (total_variation, inpainting_pixel): work split,
// images, packed signs.
//
// Work split. A thread owns a quad, 4 pixels side by side, in kChannels channels that share a mask plane, and
// walks down the rows of a chunk: the row above stays in its registers, the pixel to the right comes from the
// next thread by a shuffle. `lanes` threads, a part of a warp, make a strip; what lies beside a strip is
// loaded by its first threads, one value each. No shared memory and no barrier before the sums. Only the rows
// around a chunk are read twice. Chunks depend on the shape alone: same shape, same bits.
//
// The element type of an image is an argument, not a template parameter: a uniform branch around all quads of
// a row costs less than nine copies of every kernel.
#pragma once

#include "common/pairs.h"
#include "cuda/pixel.cuh"

namespace ik::cuda {

constexpr int kQuad = 4;
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

enum class ElementType : int { f32, f16, bf16 };

// How a call is cut into chunks.
struct Frame {
  int32_t channels;
  int32_t rows;
  int32_t width;  // in pixels
  bool whole;     // quads, all of them within the image
  int32_t lanes;  // power of two, 8..32
  int32_t log_lanes;
  int32_t chunk_rows;  // a multiple of 4
  Divider strips;      // of a row
  Divider chunks;      // of a strip
  Divider blocks;      // of a sample
  int32_t slots;       // strips of a block
  int32_t sample_slots;
  int32_t sign_rows;  // of 4 rows of pixels
  int32_t sign_quads;
};

// An image in NCHW or channels_last; null where there is none. Strides in bytes.
template <typename Byte>
struct Image {
  Byte* data;
  int64_t sample;
  int64_t channel;
  int64_t row;
  int64_t pixel;
  ElementType type;
  bool vectors;      // quads in one or three loads, aligned to their size
  bool interleaved;  // with vectors: those of all channels are one run of elements
};

// What a thread works on.
struct Spot {
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
  template <typename Byte>
  __device__ Byte* in(const Image<Byte>& image, int c, int y, int column) const {
    return image.data + sample * image.sample + static_cast<int64_t>(channel + c) * image.channel +
           y * image.row + column * image.pixel;
  }
};

template <int kChannels>
IK_DEVICE Spot locate_chunk(const Frame& frame) {
  Spot spot{};
  const uint32_t sample = frame.blocks.quotient(blockIdx.x);
  const uint32_t block = blockIdx.x - sample * frame.blocks.divisor;
  const uint32_t slot = block * frame.slots + (threadIdx.x >> frame.log_lanes);
  const uint32_t chunk = frame.strips.quotient(slot);
  const uint32_t group = frame.chunks.quotient(chunk);
  spot.sample = static_cast<int>(sample);
  spot.lane = static_cast<int>(threadIdx.x) & (frame.lanes - 1);
  spot.warp_lane = static_cast<int>(threadIdx.x) % kWarp - spot.lane;
  // The last block of a sample may have strips too many, which lie outside of the image.
  const bool idle = slot >= static_cast<uint32_t>(frame.sample_slots);
  const int strip = idle ? static_cast<int>(frame.strips.divisor) + 1
                         : static_cast<int>(slot - chunk * frame.strips.divisor);
  spot.strip_x = strip * frame.lanes * kQuad;
  spot.next_x = spot.strip_x + frame.lanes * kQuad;
  spot.x = spot.strip_x + spot.lane * kQuad;
  spot.last = spot.lane == frame.lanes - 1;
  spot.at_border = spot.x + kQuad >= frame.width;
  if (idle) return spot;
  const int left = frame.width - spot.x;
  spot.valid = left < 0 ? 0 : (left < kQuad ? left : kQuad);
  spot.channel = static_cast<int>(group) * kChannels;
  spot.channels = frame.channels - spot.channel;
  spot.begin = static_cast<int>(chunk - group * frame.chunks.divisor) * frame.chunk_rows;
  const int below = frame.rows - spot.begin;
  spot.end = spot.begin + (below < frame.chunk_rows ? below : frame.chunk_rows);
  return spot;
}

// The value of the strip's thread before or after this one; the first or last thread gets `beside`.
IK_DEVICE float from_left(const Spot& spot, float value, float beside) {
  const float other = __shfl_up_sync(0xffffffffu, value, 1);
  return spot.lane == 0 ? beside : other;
}
IK_DEVICE float from_right(const Spot& spot, float value, float beside) {
  const float other = __shfl_down_sync(0xffffffffu, value, 1);
  return spot.last ? beside : other;
}
IK_DEVICE float from_lane(const Spot& spot, float value, int lane) {
  return __shfl_sync(0xffffffffu, value, spot.warp_lane + lane);
}

// Quads of kChannels channels as they came from memory: 4 words each, 2 of a half type.
template <int kChannels>
struct RawQuads {
  uint32_t words[kChannels * kQuad];
};

template <typename T>
IK_DEVICE uint32_t element_bits(const char* address) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const uint32_t*>(address);
  } else {
    return *reinterpret_cast<const uint16_t*>(address);
  }
}

template <typename T, int kChannels>
IK_DEVICE void load_quads_of(const Image<const char>& image, const char* at, int channels, int valid,
                             RawQuads<kChannels>& raw) {
  constexpr int kWords = kQuad * static_cast<int>(sizeof(T)) / 4;
  if (!image.vectors) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c >= channels) continue;
      uint32_t packed[kWords] = {};
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (k >= valid) continue;
        const uint32_t bits = element_bits<T>(at + c * image.channel + k * image.pixel);
        packed[k * kWords / kQuad] |= bits << (8 * kWords * k % 32);
      }
#pragma unroll
      for (int i = 0; i < kWords; ++i) raw.words[c * kWords + i] = packed[i];
    }
  } else if (valid > 0 && image.interleaved) {
    // The quads of neighbouring threads share sectors with this one's, which therefore want L1.
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      load_words<4 * kWords, false>(at + 4 * kWords * c, raw.words + c * kWords);
    }
  } else if (valid > 0) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c < channels) load_words<4 * kWords, true>(at + c * image.channel, raw.words + c * kWords);
    }
  }
}

// Channels beyond `channels` and pixels beyond `valid` stay as they are, or become 0.
template <int kChannels>
IK_DEVICE void load_quads(const Image<const char>& image, const char* at, int channels, int valid,
                          RawQuads<kChannels>& raw) {
  if (image.type == ElementType::f32) {
    load_quads_of<float>(image, at, channels, valid, raw);
  } else {
    load_quads_of<Half>(image, at, channels, valid, raw);
  }
}

template <typename T, int kChannels>
IK_DEVICE void unpack_quads_of(bool interleaved, const RawQuads<kChannels>& raw,
                               float (&values)[kChannels][kQuad]) {
  Pack<T, kChannels * kQuad> pack;
#pragma unroll
  for (int i = 0; i < pack.kWords; ++i) pack.words[i] = raw.words[i];
  float flat[kChannels * kQuad];
  unpack(pack, flat);
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k)
      values[c][k] = interleaved ? flat[k * kChannels + c] : flat[c * kQuad + k];
  }
}

template <int kChannels>
IK_DEVICE void unpack_quads(const Image<const char>& image, const RawQuads<kChannels>& raw,
                            float (&values)[kChannels][kQuad]) {
  const bool interleaved = kChannels > 1 && image.interleaved;
  if (image.type == ElementType::f32) {
    unpack_quads_of<float>(interleaved, raw, values);
  } else if (image.type == ElementType::f16) {
    unpack_quads_of<Half>(interleaved, raw, values);
  } else {
    unpack_quads_of<BFloat16>(interleaved, raw, values);
  }
}

IK_DEVICE uint32_t load_element(ElementType type, const char* address) {
  return type == ElementType::f32 ? element_bits<float>(address) : element_bits<Half>(address);
}

IK_DEVICE float element_value(ElementType type, uint32_t bits) {
  if (type == ElementType::f32) return bits_to_float(bits);
  if (type == ElementType::bf16) return bits_to_float(bits << 16);
  return static_cast<float>(Half(static_cast<uint16_t>(bits), Half::from_bits()));
}

template <typename T, int kChannels>
IK_DEVICE void store_quads_of(const Image<char>& image, char* at, int channels, int valid,
                              const float (&values)[kChannels][kQuad]) {
  const bool interleaved = kChannels > 1 && image.interleaved;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    float quad[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const int flat = c * kQuad + k;
      quad[k] = interleaved ? values[flat % kChannels][flat / kChannels] : values[c][k];
    }
    Pack<T, kQuad> pack;
    pack_values(quad, pack);
    if (c >= channels) continue;
    if (image.vectors) {
      char* address = at + (interleaved ? c * pack.kBytes : c * image.channel);
      if (valid > 0) store_words<Pack<T, kQuad>::kBytes>(address, pack.words);
      continue;
    }
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (k >= valid) continue;
      char* address = at + c * image.channel + k * image.pixel;
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<uint32_t*>(address) = pack.words[k];
      } else {
        *reinterpret_cast<uint16_t*>(address) = static_cast<uint16_t>(pack.words[k / 2] >> (16 * (k % 2)));
      }
    }
  }
}

template <int kChannels>
IK_DEVICE void store_quads(const Image<char>& image, char* at, int channels, int valid,
                           const float (&values)[kChannels][kQuad]) {
  if (image.type == ElementType::f32) {
    store_quads_of<float>(image, at, channels, valid, values);
  } else if (image.type == ElementType::f16) {
    store_quads_of<Half>(image, at, channels, valid, values);
  } else {
    store_quads_of<BFloat16>(image, at, channels, valid, values);
  }
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
IK_DEVICE Word* sign_words(Word* signs, const Frame& frame, const Spot& spot) {
  const int64_t plane = static_cast<int64_t>(spot.sample) * frame.channels + spot.channel;
  const int64_t row = plane * frame.sign_rows + spot.begin / kQuad;
  return signs + row * kSignKinds<kTerms> * frame.sign_quads + spot.x / kQuad;
}

}  // namespace ik::cuda
