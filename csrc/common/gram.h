// Normalisations of Gram matrices and style losses, shared by CPU and CUDA.
//
//   G = s X X^T, X [C, M];   loss = w * coefficient * sum_{n,i,j} p(G - G')
//   d loss / d X_n = F_n X_n with the symmetric F = 2 s w coefficient p'(G - G')
#pragma once

#include "common/macros.h"

namespace ik {

enum class GramNormalize : int { chw, hw, none, gatys };

IK_HD double gram_scale(GramNormalize normalize, double channels, double pixels) {
  double count = 1.0;
  if (normalize == GramNormalize::chw) count = channels * pixels;
  if (normalize == GramNormalize::hw) count = pixels;
  return count > 0.0 ? 1.0 / count : 1.0;
}

// Factor of one layer's summed penalties; `predictions` is the batch of its input.
IK_HD double style_coefficient(GramNormalize normalize, double channels, double pixels, double predictions) {
  const double entries = predictions * channels * channels;
  const double count = normalize == GramNormalize::gatys ? 4.0 * entries * pixels * pixels : entries;
  return count > 0.0 ? 1.0 / count : 0.0;
}

IK_HD double style_penalty(bool l1, double d) { return l1 ? (d < 0.0 ? -d : d) : d * d; }

IK_HD double style_penalty_grad(bool l1, double d) {
  return l1 ? (d > 0.0 ? 1.0 : (d < 0.0 ? -1.0 : 0.0)) : 2.0 * d;
}

// An entry below the diagonal of G - G' stands for its mirror image too, whose difference is another if a
// given G' is not symmetric.
IK_HD double style_entry(bool l1, double d, double mirrored, bool diagonal) {
  return style_penalty(l1, d) + (diagonal ? 0.0 : style_penalty(l1, mirrored));
}

// Mean slope of the two: F made symmetric, with the same F + F^T.
IK_HD double style_entry_grad(bool l1, double d, double mirrored) {
  return 0.5 * (style_penalty_grad(l1, d) + style_penalty_grad(l1, mirrored));
}

}  // namespace ik
