// What a run of mask values weighs, and masks repeated for interleaved channels.
#pragma once

#include "cpu/isa/convert.h"

namespace ik::IK_ISA {

// dst[repeat * i + c] = src[i], i < n.
template <typename T>
static void repeat_each(const T* src, int64_t n, int64_t repeat, T* dst) {
  if (repeat == 3) {  // a loop that compilers turn into vectors
    for (int64_t i = 0; i < n; ++i) dst[3 * i] = dst[3 * i + 1] = dst[3 * i + 2] = src[i];
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < repeat; ++c) *dst++ = src[i];
  }
}

// The weights of one run: their sum, the sum of 1 - weight, and whether all are 0 or 1.
struct MaskScan {
  double weight = 0;
  double rest = 0;
  bool binary = true;
};

// Packs the mask into `bits` unless null; the bits are of use only if the mask is binary.
template <typename T>
MaskScan scan_mask(const T* mask, int64_t n, uint8_t* bits) {
  using V = Vec<T>;
  const V one(T(1));
  // w^2 - w is 0 for 0 and 1 alone; NaN and Inf make it NaN.
  V weight(T(0)), rest(T(0)), off(T(0));
  for_each_vector<V>(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    const V w = load_part<V>(mask + i, count);
    weight = weight + w;
    rest = rest + first_of(one - w, count);
    off = off + abs_(w * w - w);
    if (bits != nullptr) store_bits<V::lanes>(w.positive_bits(), bits + i / 8, count);
  });
  return {weight.sum(), rest.sum(), off.sum() == 0};
}

// (hole, valid) weights from the mask value.
template <typename T>
IK_INLINE void split_regions(T mask, T one, bool mask_is_hole, T& hole, T& valid) {
  hole = mask_is_hole ? mask : one - mask;
  valid = mask_is_hole ? one - mask : mask;
}

}  // namespace ik::IK_ISA
