// Mathematics of the pixel losses (masked_l1, hole_valid), shared by CPU and CUDA kernels.
//
//   loss = sum_n scale_n * S_n,   S_n = sum_i w_i * penalty(d_i),   d = pred - target
//   d loss / d pred_i = grad * scale_n * w_i * penalty'(d_i)
//
// Templates take float, double or a SIMD vector type that offers the operators below and the free functions
// abs_, sqrt_, min_ and select_zero_ (found by argument-dependent lookup).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace ik {

enum class Penalty : int { l1, l2, charbonnier, huber };
enum class Normalize : int { mask, image, sample, sum };

IK_HD float abs_(float x) { return fabsf(x); }
IK_HD double abs_(double x) { return fabs(x); }
IK_HD float sqrt_(float x) { return sqrtf(x); }
IK_HD double sqrt_(double x) { return sqrt(x); }
// The second operand wins when either is NaN, as minps and maxps do; fminf would lose the NaN.
IK_HD float min_(float a, float b) { return a < b ? a : b; }
IK_HD double min_(double a, double b) { return a < b ? a : b; }
IK_HD float max_(float a, float b) { return a > b ? a : b; }
IK_HD double max_(double a, double b) { return a > b ? a : b; }
// value where weight != 0, else 0: NaN and Inf under a zero weight must not survive a multiplication by it.
IK_HD float select_zero_(float weight, float value) { return weight == 0.0f ? 0.0f : value; }
IK_HD double select_zero_(double weight, double value) { return weight == 0.0 ? 0.0 : value; }
// value where x > 0, else other.
IK_HD float select_positive_(float x, float value, float other) { return x > 0.0f ? value : other; }
IK_HD double select_positive_(double x, double value, double other) { return x > 0.0 ? value : other; }

// penalty(d); `param` is eps of charbonnier, delta of huber, unused otherwise.
template <Penalty P, typename T>
IK_HD T penalty_value(T d, T param) {
  if constexpr (P == Penalty::l1) {
    return abs_(d);
  } else if constexpr (P == Penalty::l2) {
    return d * d;
  } else if constexpr (P == Penalty::charbonnier) {
    return sqrt_(d * d + param * param);
  } else {
    const T a = abs_(d);
    const T c = min_(param, a);
    return c * (a - T(0.5f) * c);  // a <= delta: a^2 / 2, else delta * (a - delta / 2)
  }
}

// penalty'(d) for the smooth penalties; l1 goes through sign_bits.
template <Penalty P, typename T>
IK_HD T penalty_grad(T d, T param) {
  static_assert(P != Penalty::l1, "the l1 gradient is packed in sign bits");
  if constexpr (P == Penalty::l2) {
    return d + d;
  } else if constexpr (P == Penalty::charbonnier) {
    return d / sqrt_(d * d + param * param);
  } else {
    return max_(T(0.0f) - param, min_(param, d));
  }
}

// Two bits an element: bit 0 = positive, bit 8 = negative, neither = tie, NaN (torch.sign(NaN) is 0) or
// masked out. Shifted left by the element's place in its group of 8, the bits of a group add up to one 16-bit
// word.
template <typename T>
IK_HD uint32_t sign_bits(T d) {
  return (d > T(0) ? 1u : 0u) | (d < T(0) ? 256u : 0u);
}

// coefficient * sign, from the bits of element `place` in a group's 16-bit word.
template <typename T>
IK_HD T apply_sign(uint32_t word, int place, T coefficient) {
  const bool positive = (word >> place) & 1u;
  const bool negative = (word >> (place + 8)) & 1u;
  return positive ? coefficient : (negative ? -coefficient : T(0));
}

// d loss / d S_n. `weight_n` and `weight` are the summed weights (broadcast over channels) of the sample and
// of the batch. Nothing counted means loss 0 and gradient 0, never 0/0.
IK_HD double sample_scale(Normalize normalize, double weight_n, double weight, double numel, double samples) {
  double denominator = 1.0;
  if (normalize == Normalize::image) denominator = numel;
  if (normalize == Normalize::mask) denominator = weight;
  if (normalize == Normalize::sample) denominator = weight_n * samples;
  return denominator == 0.0 ? 0.0 : 1.0 / denominator;
}

}  // namespace ik
