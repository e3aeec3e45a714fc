// Interface between the kernels over neighbouring pixels (isa/pairs.cpp) and the ops total_variation and
// inpainting_pixel.
#pragma once

#include "common/pairs.h"
#include "common/pixel.h"
#include "cpu/kernels.h"

namespace ik {

// What a unit adds up, and what becomes of the sums of a sample.
struct PairSums {
  double hole = 0, hole_weight = 0;  // losses
  double valid = 0, valid_weight = 0;
  double down = 0, across = 0;
  double region = 0;  // summed region values, broadcast over channels

  void operator+=(const PairSums& other) {
    hole += other.hole;
    hole_weight += other.hole_weight;
    valid += other.valid;
    valid_weight += other.valid_weight;
    down += other.down;
    across += other.across;
    region += other.region;
  }
};

// d loss / d sum, times the incoming gradient.
struct PairCoefficients {
  double hole, valid, down, across;
};

struct PairCall : ImageCall {
  // Segments as in PixelShape: channel planes, or whole samples in channels_last. A segment is `rows` rows of
  // `width` elements; the next pixel is `step` elements away.
  int64_t rows = 0;
  int64_t width = 0;
  int64_t step = 1;
  int64_t mask_width = 0;  // elements of a mask row; Dtype::bits: as `mask_bits`
  int64_t mask_step = 1;
  Region region = Region::image;
  Penalty penalty = Penalty::l1;
  bool composite = false;    // of pred and target, else pred alone
  bool losses = false;       // hole and valid terms, too
  bool sum_region = false;   // PairSums::region is wanted
  uint8_t* signs = nullptr;  // ops/_pairs.py

  // Forward.
  PairSums* sums = nullptr;      // [units]
  uint8_t* binary = nullptr;     // set to 0 if a weight is neither 0 nor 1
  uint8_t* mask_bits = nullptr;  // [mask samples, mask planes, rows, mask_groups]

  // Backward.
  const PairCoefficients* coefficients = nullptr;  // [N]
  bool pair_weights = false;                       // not all 0 (no sign) or 1

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

  // The row below a unit is read twice.
  static constexpr int64_t unit_elements = 16384;
  int64_t unit_rows() const { return width >= unit_elements ? 1 : unit_elements / (width > 0 ? width : 1); }
  int64_t chunks() const { return (rows + unit_rows() - 1) / unit_rows(); }
  Unit unit(int64_t index) const { return unit_of(index, rows, unit_rows()); }
  int64_t units() const { return shape.numel() > 0 ? shape.samples * segment_groups() * chunks() : 0; }
};

}  // namespace ik

IK_DECLARE_PER_ISA(Kernels<PairCall>, pair_kernels)
