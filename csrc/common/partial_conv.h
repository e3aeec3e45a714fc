// Partial convolution: what follows from the mask summed over a window, and what is done to a convolution's
// result, one element at a time. V is a scalar or, on the CPU, a vector of them.
#pragma once

#include "common/pixel.h"

namespace ik {

enum class MaskUpdate : int { clamp, binary, proportional };
enum class Activation : int { none, relu, leaky_relu };

// Windows over a mask [N, C, H, W] or [N, C, D, H, W]; sizes and strides as (depth, height, width).
struct WindowShape {
  int64_t samples = 0;
  int64_t groups = 1;   // planes
  int64_t members = 1;  // channels of a plane
  int64_t mask_stride[5] = {};
  int64_t size[3] = {1, 1, 1};
  int64_t out_size[3] = {1, 1, 1};
  int64_t kernel[3] = {1, 1, 1};
  int64_t stride[3] = {1, 1, 1};
  int64_t padding[3] = {0, 0, 0};
  int64_t dilation[3] = {1, 1, 1};
};

// numerator / s * min(s, 1) for clamp, numerator / s else; 0 for an empty window. Finite however small s is.
template <typename T>
IK_HD T window_ratio(T s, T numerator, T largest, MaskUpdate update) {
  if (s == T(0)) return T(0);
  if (update == MaskUpdate::clamp) return numerator / max_(s, T(1));
  return min_(numerator / s, largest);
}

// The new mask; `size` is the number of mask values in a window.
template <typename T>
IK_HD T window_mask(T s, T size, MaskUpdate update) {
  if (s == T(0)) return T(0);
  if (update == MaskUpdate::clamp) return min_(s, T(1));
  return update == MaskUpdate::binary ? T(1) : s / size;
}

// How a convolution's result becomes the layer's. `slope` is 0 for relu.
struct Finish {
  bool weigh_bias = false;  // (raw * ratio + bias) * new_mask
  bool scale_bias = false;  // act(raw + bias) * ratio
  Activation activation = Activation::none;
};

// NaN stays NaN: max_ and min_ give their second operand then.
template <typename V>
IK_HD V activate(V x, V slope, Activation activation) {
  if (activation == Activation::none) return x;
  const V positive = max_(V(0.0f), x);
  return activation == Activation::relu ? positive : positive + slope * min_(V(0.0f), x);
}

template <typename V>
IK_HD V finish(V raw, V ratio, V new_mask, V bias, V slope, const Finish& how) {
  if (how.scale_bias) return select_zero_(new_mask, activate(raw + bias, slope, how.activation) * ratio);
  V x = raw * ratio + bias;
  if (how.weigh_bias) x = x * new_mask;
  return activate(select_zero_(new_mask, x), slope, how.activation);
}

// Gradient by what the bias is added to, of which the bias' gradient is the sum; `out` is finish's result and
// read with an activation only.
template <typename V>
IK_HD V finish_bias_grad(V grad, V out, V ratio, V new_mask, V slope, const Finish& how) {
  V g = select_zero_(new_mask, grad);
  if (how.scale_bias) g = g * ratio;
  if (how.activation != Activation::none) g = select_positive_(out, g, g * slope);
  return how.weigh_bias ? g * new_mask : g;
}

// Gradient by the convolution's result.
template <typename V>
IK_HD V finish_raw_grad(V bias_grad, V ratio, const Finish& how) {
  return how.scale_bias ? bias_grad : bias_grad * ratio;
}

}  // namespace ik
