// Forward over neighbouring pixels: sums of the terms, and the signs of the differences.
#pragma once

#include "cpu/isa/pairs_images.h"

namespace ik::IK_ISA {
namespace {

// Pairs of one direction.
template <typename T>
struct Pairs {
  const T *here, *next;     // the two pixels; null: no pairs of this direction
  const T *first, *second;  // their weights
  uint8_t* signs;           // two planes, `groups` bytes apart; null: none
  int64_t groups;
};

// Weight * penalty(next - here) of `count` pairs from the i-th on; their signs go to the bits from `place`
// on.
template <Penalty P, bool WEIGHTED, bool SIGNS, typename V, typename T>
IK_INLINE V pair_value(const Pairs<T>& pairs, int64_t i, int count, int place, uint32_t& positive,
                       uint32_t& negative) {
  V d, value;
  if constexpr (WEIGHTED) {
    const V weight = load_part<V>(pairs.first + i, count) * load_part<V>(pairs.second + i, count);
    // Most of an image is no hole, in long runs.
    if (all_equal_(weight, V(T(0)))) return weight;
    d = select_zero_(weight, load_part<V>(pairs.next + i, count) - load_part<V>(pairs.here + i, count));
    value = penalty_value<P>(d, d) * weight;
  } else {
    d = load_part<V>(pairs.next + i, count) - load_part<V>(pairs.here + i, count);
    value = penalty_value<P>(d, d);
  }
  if constexpr (SIGNS) {
    positive |= d.positive_bits() << place;
    negative |= d.negative_bits() << place;
  }
  return value;
}

// The same of `vectors` whole vectors, or of one that is not whole, with their signs stored.
template <Penalty P, bool WEIGHTED, bool SIGNS, int VECTORS, typename V, typename T>
IK_INLINE V pair_block(const Pairs<T>& pairs, int64_t i, int count) {
  uint32_t positive = 0, negative = 0;
  V sum(T(0));
  for (int v = 0; v < VECTORS; ++v) {
    const int place = v * V::lanes;
    sum = sum + pair_value<P, WEIGHTED, SIGNS, V>(pairs, i + place, VECTORS > 1 ? V::lanes : count, place,
                                                  positive, negative);
  }
  if constexpr (SIGNS) {
    store_bits<VECTORS * V::lanes>(positive, pairs.signs + i / 8, count);
    store_bits<VECTORS * V::lanes>(negative, pairs.signs + pairs.groups + i / 8, count);
  }
  return sum;
}

// Adds up weight * penalty(next - here) over the pairs of a row of `n` elements: those within the row and those
// with the row above it. The pairs are copies: a byte of the signs could be part of them, for all the compiler
// knows.
template <Penalty P, bool WEIGHTED, bool SIGNS, bool ACROSS, bool DOWN, typename T>
void pair_run(const Pairs<T> beside, const Pairs<T> below, int64_t n, int64_t step, PairSums& sums) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  constexpr int vectors = 32 / lanes;
  V across(T(0)), down(T(0));
  int64_t i = 0;
  for (; i + 32 + step <= n; i += 32) {
    for (int64_t line = 0; line < 32; line += 64 / static_cast<int64_t>(sizeof(T)))
      prefetch((ACROSS ? beside.here : below.next) + i + line);
    if (ACROSS) across = across + pair_block<P, WEIGHTED, SIGNS, vectors, V>(beside, i, 32);
    if (DOWN) down = down + pair_block<P, WEIGHTED, SIGNS, vectors, V>(below, i, 32);
  }
  for (; i < n; i += lanes) {
    const int count = static_cast<int>(least(lanes, n - i));
    const int across_count = static_cast<int>(least(lanes, n - step - i));
    if (ACROSS && across_count > 0) {
      across = across + pair_block<P, WEIGHTED, SIGNS, 1, V>(beside, i, across_count);
    }
    if (DOWN) down = down + pair_block<P, WEIGHTED, SIGNS, 1, V>(below, i, count);
  }
  if (ACROSS) sums.across += across.sum();
  if (DOWN) sums.down += down.sum();
}

template <typename T>
void add_pairs(const PairCall& call, const Pairs<T>& beside, const Pairs<T>& below, PairSums& sums) {
  const auto add = [&](auto penalty, auto signs, auto weighted) {
    constexpr Penalty P = decltype(penalty)::value;
    constexpr bool S = decltype(signs)::value, W = decltype(weighted)::value;
    if (below.here == nullptr)
      return pair_run<P, W, S, true, false>(beside, below, call.width, call.step, sums);
    beside.here != nullptr ? pair_run<P, W, S, true, true>(beside, below, call.width, call.step, sums)
                           : pair_run<P, W, S, false, true>(beside, below, call.width, call.step, sums);
  };
  with_bool(call.region != Region::image, [&](auto weighted) {
    constexpr std::integral_constant<Penalty, Penalty::l1> l1;
    if (call.penalty == Penalty::l2) {
      return add(std::integral_constant<Penalty, Penalty::l2>(), std::false_type(), weighted);
    }
    with_bool(call.signs != nullptr, [&](auto signs) { add(l1, signs, weighted); });
  });
}

// What a row of the mask weighs, times the `shares` elements that each of its values stands for.
template <typename T>
void scan_row(const PairCall& call, MaskRows<T>& mask, int64_t sample, int64_t segment, int64_t y,
              double shares, PairSums& sums) {
  const bool first = call.shape.mask_stride_n != 0 || sample == 0;
  uint8_t* bits =
      call.mask_bits != nullptr && first ? call.mask_bits + call.mask_bits_row(sample, segment, y) : nullptr;
  const MaskScan scan = scan_mask(mask.mask(y), call.mask_width, bits);
  if (call.binary != nullptr && !scan.binary) __atomic_store_n(call.binary, 0, __ATOMIC_RELAXED);
  const double weight = shares * static_cast<double>(call.shape.mask_repeat);
  sums.hole_weight += weight * (call.mask_is_hole ? scan.weight : scan.rest);
  sums.valid_weight += weight * (call.mask_is_hole ? scan.rest : scan.weight);
}

template <typename T>
double sum_row(const T* row, int64_t n) {
  using V = Vec<T>;
  V sum(T(0));
  for_each_vector<V>(n, [&](int64_t i, int count) { sum = sum + load_part<V>(row + i, count); });
  return sum.sum();
}

template <typename T>
void forward_units(const PairCall& call, int64_t unit_begin, int64_t unit_end) {
  Rows<T> rows(call);
  const int64_t groups = call.groups();
  const int64_t n = call.width;
  for (int64_t index = unit_begin; index < unit_end; ++index) {
    const Unit unit = call.unit(index);
    rows.begin(unit);
    PairSums sums;
    const int64_t last = least(unit.end + 1, call.rows);
    // Segment by segment: their rows lie a power of two apart, and fall on the same lines of the cache.
    for (int64_t s = 0; s < unit.segments(); ++s) {
      const int64_t segment = unit.segment_begin + s;
      const T* above = nullptr;
      for (int64_t y = unit.begin; y < last; ++y) {
        const bool own = y < unit.end;
        MaskRows<T>& mask = rows.mask(s);
        if (own && call.mask != nullptr && (s == 0 || call.shape.mask_stride_c != 0)) {
          const double shares = call.shape.mask_stride_c != 0 ? 1.0 : static_cast<double>(unit.segments());
          scan_row(call, mask, unit.sample, segment, y, shares, sums);
          if (call.sum_region) sums.region += shares * sum_row(mask.region(y), n);
        }
        uint8_t* signs = nullptr;
        if (call.signs != nullptr && own) {
          signs = call.sign_row(unit.sample, segment, y);
          std::memset(signs, 0, static_cast<size_t>(4 * groups));
        }
        const T* image;
        if (own && call.losses) {
          bool ready;
          T* row = rows.image_slot(s, y, ready);
          mix_row<true>(rows.pred(s, y), rows.target(s, y), mask.weights(y), n, call.mask_is_hole, row, &sums,
                        signs ? signs + 4 * groups : nullptr, groups);
          image = row;
        } else if (!call.composite && call.pred_dtype == kNative<T>) {
          image = rows.pred(s, y);
        } else {
          image = image_row(call, rows, s, y);
        }
        Pairs<T> beside{nullptr, nullptr, nullptr, nullptr, signs, groups}, below = beside;
        if (own) {
          beside.here = image;
          beside.next = image + call.step;
        }
        if (above != nullptr) {
          below.here = above;
          below.next = image;
          if (call.signs != nullptr) below.signs = call.sign_row(unit.sample, segment, y - 1) + 2 * groups;
        }
        if (call.region != Region::image) {
          beside.first = mask.first(y);
          beside.second = mask.second(y) + call.step;
          if (above != nullptr) below.first = mask.first(y - 1);
          below.second = mask.second(y);
        }
        add_pairs(call, beside, below, sums);
        above = image;
      }
    }
    call.sums[index] = sums;
  }
}

}  // namespace
}  // namespace ik::IK_ISA
