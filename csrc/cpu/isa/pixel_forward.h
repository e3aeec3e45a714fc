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

// `positive` and `negative`: a bit for each of `count` elements, a multiple of 8, into bytes that alternate.
IK_INLINE void store_signs(uint8_t* signs, int count, uint32_t positive, uint32_t negative) {
#if defined(IK_ISA_AVX512) || defined(IK_ISA_AVX2)
  const __m128i bytes = _mm_unpacklo_epi8(_mm_cvtsi32_si128(static_cast<int>(positive)),
                                          _mm_cvtsi32_si128(static_cast<int>(negative)));
  if (count == 32) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(signs), bytes);
  } else {
    const int word = _mm_cvtsi128_si32(bytes);
    std::memcpy(signs, &word, 4);
  }
#else
  for (int g = 0; g < count / 8; ++g) {
    signs[2 * g] = static_cast<uint8_t>(positive >> (8 * g));
    signs[2 * g + 1] = static_cast<uint8_t>(negative >> (8 * g));
  }
#endif
}

// One step on a vector (V = Vec<T>) or on a single element (V = T) of a run. sums: of the first and the
// second region, or where the mask is 1 and where it is 0.
template <Penalty P, Weights W, typename V>
IK_INLINE V forward_step(V pred, V target, V mask, V one, V param, bool mask_is_hole, V* sums, V& out) {
  V d = pred - target;
  if constexpr (W == Weights::mask || W == Weights::binary_mask) d = select_zero_(mask, d);
  const V value = penalty_value<P>(d, param);
  if constexpr (W == Weights::none) {
    out = value;
  } else if constexpr (W == Weights::mask) {
    out = value * mask;
  } else if constexpr (W == Weights::binary_mask) {
    out = P == Penalty::charbonnier ? select_zero_(mask, value) : value;  // of a difference of 0: eps, else 0
  } else if constexpr (W == Weights::two_binary_regions) {
    out = select_zero_(mask, value);
    sums[1] = sums[1] + select_if_zero_(mask, value);
  } else {
    V hole, valid;
    split_regions(mask, one, mask_is_hole, hole, valid);
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
  int64_t i = 0;
  for (; i + 2 * V::lanes <= run.n; i += 2 * V::lanes) {
    uint32_t positive[K] = {};
    uint32_t negative[K] = {};
    for (int u = 0; u < 2; ++u) {
      const int64_t at = i + u * V::lanes;
      prefetch(run.target + at);
      const V target = load_vec(run.target + at);
      const V mask = W == Weights::none ? one : V::load(run.weight + at);
      for (int k = 0; k < K; ++k) {
        prefetch(run.pred[k] + at);
        V out;
        const V d = forward_step<P, W>(load_vec(run.pred[k] + at), target, mask, one, param, run.mask_is_hole,
                                       sums[u], out);
        if constexpr (MAP) out.store(run.map + at);
        if constexpr (SIGNS) {
          positive[k] |= d.positive_bits() << (u * V::lanes);
          negative[k] |= d.negative_bits() << (u * V::lanes);
        }
      }
    }
    if constexpr (SIGNS) {
      for (int k = 0; k < K; ++k) store_signs(run.signs[k] + i / 4, 2 * V::lanes, positive[k], negative[k]);
    }
  }
  T tail_sums[2] = {T(0), T(0)};
  while (i < run.n) {
    const int64_t end = i + 8 < run.n ? i + 8 : run.n;
    for (int k = 0; k < K; ++k) {
      uint32_t word = 0;
      for (int64_t at = i; at < end; ++at) {
        T out;
        const T d = forward_step<P, W, T>(load_one(run.pred[k] + at), load_one(run.target + at),
                                          W == Weights::none ? T(1) : run.weight[at], T(1), run.param,
                                          run.mask_is_hole, tail_sums, out);
        if constexpr (MAP) run.map[at] = out;
        if constexpr (SIGNS) word |= sign_bits(d) << (at - i);
      }
      if constexpr (SIGNS) {
        run.signs[k][i / 4] = static_cast<uint8_t>(word);
        run.signs[k][i / 4 + 1] = static_cast<uint8_t>(word >> 8);
      }
    }
    i = end;
  }
  if constexpr (!MAP) {
    const bool swap = W == Weights::two_binary_regions && !run.mask_is_hole;
    for (int r = 0; r < (has_two_regions(W) ? 2 : 1); ++r) {
      sum[swap ? 1 - r : r] += (sums[0][r] + sums[1][r]).sum() + static_cast<double>(tail_sums[r]);
    }
  }
}

}  // namespace ik::IK_ISA
