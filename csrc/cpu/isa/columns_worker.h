// Channel columns: what both directions share.
#pragma once

#include "cpu/columns.h"

#include "cpu/isa/convert.h"
#include "cpu/isa/scratch.h"

namespace ik::IK_ISA {
namespace {

// a r - b s, exactly 0 for equal operands, fused products or not: both are taken relative to the rounded b s.
template <typename V>
IK_INLINE V difference(V a, V r, V b, V s, V minus_s) {
  const V rounded = b * minus_s;
  return fma_(a, r, rounded) - fma_(b, s, rounded);
}

// Per-pixel numbers of one block, `stride` apart.
template <typename T>
struct Planes {
  T* data;
  int64_t stride;
  T* plane(int index) const { return data + index * stride; }
};

// What both directions share: where a block lies, its mask, the weights.
template <typename T>
class Worker {
 public:
  using V = Vec<T>;

  Worker(const ColumnsCall& call, int planes)
      : call_(call),
        stride_(call.step() + 16),
        planes_data_(planes * stride_),
        mask_(stride_),
        weights_(call.channels + 16) {
    for (int64_t c = 0; c < call.channels; ++c) weights_.get()[c] = static_cast<T>(call.weights[c]);
    // Whole vectors are read of them.
    for (int64_t c = call.channels; c < call.channels + 16; ++c) weights_.get()[c] = T(0);
  }

 protected:
  struct Block {
    int64_t sample, begin, n;  // sample of the target
  };
  Block block(int64_t unit) const {
    const int64_t begin = unit % call_.blocks() * call_.step();
    return {unit / call_.blocks(), begin, least(call_.step(), call_.pixels - begin)};
  }
  int64_t sample_of(const Block& block, int64_t prediction) const {
    return prediction * call_.samples + block.sample;
  }
  // Null without a mask.
  const T* mask_of(const Block& block, int64_t sample) {
    if (call_.mask == nullptr) return nullptr;
    const int64_t plane = call_.mask_per_prediction ? sample : block.sample;
    return fetch(call_.mask, call_.mask_dtype, plane * call_.mask_stride + block.begin, block.n, mask_.get());
  }
  // Place of (sample, channel, pixel).
  int64_t row_offset(int64_t sample, int64_t c, int64_t pixel) const {
    return (sample * call_.channels + c) * call_.pixels + pixel;
  }
  int64_t pixel_offset(int64_t sample, int64_t pixel) const {
    return (sample * call_.pixels + pixel) * call_.channels;
  }
  T* saved(int index, int64_t sample, int64_t pixel) const {
    const int64_t samples = call_.samples * call_.predictions;
    return static_cast<T*>(call_.saved) + (index * samples + sample) * call_.pixels + pixel;
  }

  const ColumnsCall& call_;
  int64_t stride_;
  Scratch<T> planes_data_, mask_, weights_;
};

}  // namespace
}  // namespace ik::IK_ISA
