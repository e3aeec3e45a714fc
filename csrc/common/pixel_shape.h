// Memory view of the tensors of one pixel-loss call, free of torch headers.
#pragma once

#include <cstdint>

namespace ik {

// Memory view of one call. A segment is a run of `length` consecutive elements: a channel plane in NCHW, a
// whole sample in channels_last. Element i of segment (n, c) reads the mask at mask + n * mask_stride_n + c *
// mask_stride_c + i / mask_repeat.
struct PixelShape {
  int64_t samples = 0;   // N
  int64_t segments = 0;  // per sample: C in NCHW, 1 in channels_last
  int64_t length = 0;    // H*W in NCHW, H*W*C in channels_last
  int64_t channels = 0;  // C
  int64_t pixels = 0;    // H*W
  bool has_mask = false;
  int64_t mask_stride_n = 0;
  int64_t mask_stride_c = 0;
  int64_t mask_repeat = 1;
  int64_t mask_multiplicity = 1;  // channels that share one mask value: C for a single-channel mask

  int64_t groups() const { return (length + 7) / 8; }
  int64_t numel() const { return samples * segments * length; }
  // The same in both layouts (channels_last needs no more), so that the fake kernel needs no strides.
  int64_t sign_bytes() const { return 2 * samples * channels * ((pixels + 7) / 8); }
};

}  // namespace ik
