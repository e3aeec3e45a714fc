// Backward of the pixel losses on one run of elements: coefficient * weight * penalty'(d), from the signs for
// l1 and from pred and target otherwise.
#pragma once

#include "cpu/isa/pixel_forward.h"

namespace ik::IK_ISA {

template <typename S, typename T>
struct BackwardRun {
  const T* pred;
  const T* target;
  const T* weight;
  const T* grad;  // map mode
  int64_t n;
  T coefficient[2];
  T param;
  bool mask_is_hole;
  const uint8_t* signs;
  S* grad_pred;
  S* grad_target;
  bool stream;
};

template <Weights W, typename V>
IK_INLINE V backward_coefficient(V first, V second, V mask, V one, bool mask_is_hole) {
  if constexpr (W == Weights::none) return first;
  if constexpr (W == Weights::mask) return first * mask;
  V hole, valid;
  split_regions(mask, one, mask_is_hole, hole, valid);
  return select_zero_(hole, first * hole) + select_zero_(valid, second * valid);
}

template <Penalty P, Weights W, bool MAP, typename S, typename T>
void backward_run(const BackwardRun<S, T>& run) {
  using V = Vec<T>;
  const V one(T(1)), zero(T(0)), param(run.param), first(run.coefficient[0]), second(run.coefficient[1]);
  for_each_vector<V>(run.n, [&](int64_t i, int count) __attribute__((always_inline)) {
    const V mask = W == Weights::none ? one : load_part<V>(run.weight + i, count);
    const V c = backward_coefficient<W>(MAP ? load_part<V>(run.grad + i, count) : first, second, mask, one,
                                        run.mask_is_hole);
    V out;
    if constexpr (P == Penalty::l1) {
      uint32_t positive = 0;
      uint32_t negative = 0;
      for (int g = 0; 8 * g < count; ++g) {
        positive |= static_cast<uint32_t>(run.signs[i / 4 + 2 * g]) << (8 * g);
        negative |= static_cast<uint32_t>(run.signs[i / 4 + 2 * g + 1]) << (8 * g);
      }
      out = V::signed_by(positive, negative, c);
    } else {
      prefetch(run.pred + i);
      prefetch(run.target + i);
      out =
          c * penalty_grad<P>(load_part<V>(run.pred + i, count) - load_part<V>(run.target + i, count), param);
      // A region without a gradient has coefficient 0, and NaN in it must not reach the gradient.
      if constexpr (W != Weights::none) out = select_zero_(W == Weights::mask ? mask : c, out);
    }
    if (run.grad_pred) store_part(out, run.grad_pred + i, count, run.stream);
    if (run.grad_target) store_part(zero - out, run.grad_target + i, count, run.stream);
  });
}

}  // namespace ik::IK_ISA
