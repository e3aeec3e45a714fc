// Interface between the kernels over neighbouring pixels (pairs.cpp, one build per instruction set) and the
// registrations of total_variation and inpainting_pixel.
#pragma once

#include <cstdint>

#include "common/pairs.h"
#include "common/pixel.h"
#include "common/pixel_shape.h"
#include "cpu/isa.h"

namespace ik {

enum class Dtype : int;

// What a unit adds up, and what becomes of the sums of a sample.
struct PairSums {
  double hole = 0, hole_weight = 0;  // losses
  double valid = 0, valid_weight = 0;
  double down = 0, across = 0;
  double region = 0;  // summed region values, broadcast over channels
};

// d loss / d sum, times the incoming gradient.
struct PairCoefficients {
  double hole, valid, down, across;
};

struct PairCall {
  // Segments as in PixelShape: channel planes, or whole samples in channels_last. A segment is `rows` rows of
  // `width` elements; the next pixel is `step` elements away.
  PixelShape shape;
  int64_t rows = 0;
  int64_t width = 0;
  int64_t step = 1;
  int64_t mask_width = 0;  // elements of a mask row
  int64_t mask_step = 1;
  Region region = Region::image;
  Penalty penalty = Penalty::l1;
  bool mask_is_hole = false;
  bool composite = false;   // of pred and target, else pred alone
  bool losses = false;      // hole and valid terms, too
  bool sum_region = false;  // PairSums::region is wanted
  bool wide = false;        // compute in double

  const void* pred = nullptr;
  const void* target = nullptr;
  const void* mask = nullptr;  // Dtype::bits: as `mask_bits`
  Dtype pred_dtype{}, target_dtype{}, mask_dtype{};
  uint8_t* signs = nullptr;  // ops/_pairs.py

  // Forward.
  PairSums* sums = nullptr;      // [units]
  uint8_t* binary = nullptr;     // set to 0 if a weight is neither 0 nor 1
  uint8_t* mask_bits = nullptr;  // [mask samples, mask planes, rows, mask_groups]

  // Backward.
  const PairCoefficients* coefficients = nullptr;  // [N]
  bool pair_weights = false;                       // not all 0 (no sign) or 1
  void* grad_pred = nullptr;
  void* grad_target = nullptr;
  bool stream = false;  // write the gradients around the cache

  int64_t planes() const { return losses ? 6 : 4; }
  int64_t groups() const { return (width + 7) / 8; }
  int64_t mask_groups() const { return (mask_width + 7) / 8; }
  int64_t mask_planes() const { return shape.mask_stride_c == 0 ? 1 : shape.segments; }
  // Offset of a row of the packed mask.
  int64_t mask_bits_row(int64_t sample, int64_t segment, int64_t row) const {
    const int64_t n = shape.mask_stride_n == 0 ? 0 : sample;
    const int64_t c = shape.mask_stride_c == 0 ? 0 : segment;
    return ((n * mask_planes() + c) * rows + row) * mask_groups();
  }
  uint8_t* sign_row(int64_t sample, int64_t segment, int64_t row) const {
    return signs + ((sample * shape.segments + segment) * rows + row) * planes() * groups();
  }

  // A unit is a run of rows of up to 4 segments of one sample, which share the rows of a single-channel mask.
  // Fixed by the shape alone, so that results do not depend on the number of threads. The row below it is
  // read twice.
  static constexpr int64_t unit_segments = 4;
  static constexpr int64_t unit_elements = 16384;
  int64_t unit_rows() const { return width >= unit_elements ? 1 : unit_elements / (width > 0 ? width : 1); }
  int64_t chunks() const { return (rows + unit_rows() - 1) / unit_rows(); }
  int64_t segment_groups() const { return (shape.segments + unit_segments - 1) / unit_segments; }
  int64_t units() const { return shape.numel() > 0 ? shape.samples * segment_groups() * chunks() : 0; }
};

using PairKernel = void (*)(const PairCall& call, int64_t unit_begin, int64_t unit_end);
struct PairKernels {
  PairKernel forward;
  PairKernel backward;
};

}  // namespace ik

IK_DECLARE_PER_ISA(PairKernels, pair_kernels)
namespace ik {
namespace generic {
extern const PairKernels pair_kernels_wide;
}
}  // namespace ik
