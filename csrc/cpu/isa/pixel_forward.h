// Forward of the pixel losses on one run of elements: sums of the penalty over one or two regions, the packed
// signs of the differences for l1, or the map of the weighted penalty.
#pragma once

#include "cpu/isa/masks.h"
#include "cpu/isa/scratch.h"
#include "cpu/pixel.h"

namespace ik::IK_ISA {

// What a mask means to a run. A mask of zeros and ones selects and needs no multiplication.
enum class Weights { none, mask, binary_mask, two_regions, two_binary_regions };

constexpr bool has_two_regions(Weights w) {
  return w == Weights::two_regions || w == Weights::two_binary_regions;
}

// K predictions of one target.
template <typename S, typename T, int K = 1>
struct ForwardRun {
  const S* pred[K];
  const S* target;
  const T* weight;
  int64_t n;
  T param;
  bool mask_is_hole;
  uint8_t* signs[K];
  T* map;
};

// `positive` and `negative`: a bit for each element of `groups` of 8, into bytes that alternate.
IK_INLINE void store_signs(uint8_t* signs, int groups, uint32_t positive, uint32_t negative) {
#if defined(IK_ISA_AVX)
  if (groups == Vec<float>::lanes / 4) {
    const __m128i bytes = _mm_unpacklo_epi8(_mm_cvtsi32_si128(static_cast<int>(positive)),
                                            _mm_cvtsi32_si128(static_cast<int>(negative)));
    std::memcpy(signs, &bytes, Vec<float>::lanes / 2);
    return;
  }
#endif
  for (int g = 0; g < groups; ++g) {
    signs[2 * g] = static_cast<uint8_t>(positive >> (8 * g));
    signs[2 * g + 1] = static_cast<uint8_t>(negative >> (8 * g));
  }
}

// `count` elements, 0 behind them. sums: of the first and the second region, or where the mask is 1 and where
// it is 0.
template <Penalty P, Weights W, typename V>
IK_INLINE V forward_step(V pred, V target, V mask, V param, int count, bool mask_is_hole, V* sums, V& out) {
  V d = pred - target;
  if constexpr (W == Weights::mask || W == Weights::binary_mask) d = select_zero_(mask, d);
  V value = penalty_value<P>(d, param);
  // Of a difference of 0 eps, else 0.
  if constexpr (P == Penalty::charbonnier) value = first_of(value, count);
  if constexpr (W == Weights::none) {
    out = value;
  } else if constexpr (W == Weights::mask) {
    out = value * mask;
  } else if constexpr (W == Weights::binary_mask) {
    out = P == Penalty::charbonnier ? select_zero_(mask, value) : value;
  } else if constexpr (W == Weights::two_binary_regions) {
    out = select_zero_(mask, value);
    sums[1] = sums[1] + select_if_zero_(mask, value);
  } else {
    V hole, valid;
    split_regions(mask, V(1.0f), mask_is_hole, hole, valid);
    out = select_zero_(hole, value * hole);
    sums[1] = sums[1] + select_zero_(valid, value * valid);
  }
  sums[0] = sums[0] + out;
  return d;
}

// Adds the sums of the run to sum[0] and sum[1].
template <Penalty P, Weights W, bool MAP, bool SIGNS, typename S, typename T, int K>
void forward_run(const ForwardRun<S, T, K>& run, double* sum) {
  using V = Vec<T>;
  const V one(T(1)), param(run.param);
  // Two independent sets of accumulators hide the latency of the additions.
  V sums[2][2] = {{V(T(0)), V(T(0))}, {V(T(0)), V(T(0))}};
  struct Signs {
    uint32_t positive[K] = {};
    uint32_t negative[K] = {};
  };
  // A vector of `count` elements; their signs go to the bits from `place` on.
  const auto step = [&](int64_t at, int count, V* sums, Signs& signs, int place)
                        __attribute__((always_inline)) {
                          prefetch(run.target + at);
                          const V target = load_part<V>(run.target + at, count);
                          const V mask = W == Weights::none ? one : load_part<V>(run.weight + at, count);
                          for (int k = 0; k < K; ++k) {
                            prefetch(run.pred[k] + at);
                            V out;
                            const V d = forward_step<P, W>(load_part<V>(run.pred[k] + at, count), target,
                                                           mask, param, count, run.mask_is_hole, sums, out);
                            if constexpr (MAP) store_part(out, run.map + at, count);
                            if constexpr (SIGNS) {
                              signs.positive[k] |= d.positive_bits() << place;
                              signs.negative[k] |= d.negative_bits() << place;
                            }
                          }
                        };
  const auto store = [&](int64_t at, int groups, const Signs& signs) __attribute__((always_inline)) {
    for (int k = 0; SIGNS && k < K; ++k) {
      store_signs(run.signs[k] + at / 4, groups, signs.positive[k], signs.negative[k]);
    }
  };
  int64_t i = 0;
  for (; i + 2 * V::lanes <= run.n; i += 2 * V::lanes) {
    Signs signs;
    for (int u = 0; u < 2; ++u) step(i + u * V::lanes, V::lanes, sums[u], signs, u * V::lanes);
    store(i, V::lanes / 4, signs);
  }
  for (; i < run.n; i += V::lanes) {
    const int count = static_cast<int>(least(V::lanes, run.n - i));
    Signs signs;
    step(i, count, sums[0], signs, 0);
    store(i, (count + 7) / 8, signs);
  }
  if constexpr (!MAP) {
    const bool swap = W == Weights::two_binary_regions && !run.mask_is_hole;
    for (int r = 0; r < (has_two_regions(W) ? 2 : 1); ++r) {
      sum[swap ? 1 - r : r] += (sums[0][r] + sums[1][r]).sum();
    }
  }
}

}  // namespace ik::IK_ISA
