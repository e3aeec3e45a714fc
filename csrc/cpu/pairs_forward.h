// Forward over neighbouring pixels: sums of the terms, and the signs of the differences.
#pragma once

#include "cpu/pairs_images.h"

namespace ik {
namespace IK_ISA {
namespace {

// A row of the image, and the one above it, with their pair weights and sign planes.
template <typename T>
struct PairRun {
  const T* image;
  const T* above;        // null: no pairs between the two
  const T* first;        // of this row
  const T* first_above;  // of the row above
  const T* second;       // of this row
  int64_t n, step;
  bool has_across;        // pairs within this row
  uint8_t* across_signs;  // planes 0 and 1 of this row; null: none
  uint8_t* down_signs;    // planes 2 and 3 of the row above
  int64_t groups;
};

template <Penalty P, bool WEIGHTED, bool SIGNS, typename V, typename T>
IK_INLINE V pair_value(const T* here, const T* next, const T* first, const T* second, int64_t i, int count,
                       uint8_t* signs, int64_t groups) {
  V d, value;
  const auto difference = [&] { return load_part<V>(next + i, count) - load_part<V>(here + i, count); };
  if constexpr (WEIGHTED) {
    const V weight = load_part<V>(first + i, count) * load_part<V>(second + i, count);
    // Most of an image is no hole, in long runs; signs are 0 already.
    if (all_equal_(weight, V(T(0)))) return weight;
    d = select_zero_(weight, difference());
    value = penalty_value<P>(d, d) * weight;
  } else {
    d = difference();
    value = penalty_value<P>(d, d);
  }
  if constexpr (SIGNS) {
    store_bits<V::lanes>(d.positive_bits(), signs, i, count);
    store_bits<V::lanes>(d.negative_bits(), signs + groups, i, count);
  }
  return value;
}

// Adds up weight * penalty(next - here) over the pairs of a run, and packs their signs.
template <Penalty P, bool WEIGHTED, bool SIGNS, bool ACROSS, bool DOWN, typename T>
void pair_run(const PairRun<T>& run, PairSums& sums) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  V across(T(0)), down(T(0));
  const auto add = [&](int64_t i, int count, int across_count) __attribute__((always_inline)) {
    prefetch(run.image + i);
    if (ACROSS && across_count > 0) {
      across = across + pair_value<P, WEIGHTED, SIGNS, V>(run.image, run.image + run.step, run.first,
                                                          WEIGHTED ? run.second + run.step : nullptr, i,
                                                          across_count, run.across_signs, run.groups);
    }
    if constexpr (DOWN) {
      down = down + pair_value<P, WEIGHTED, SIGNS, V>(run.above, run.image, run.first_above, run.second, i,
                                                      count, run.down_signs, run.groups);
    }
  };
  int64_t i = 0;
  for (; i + lanes + run.step <= run.n; i += lanes) add(i, lanes, lanes);
  for (; i < run.n; i += lanes) {
    add(i, static_cast<int>(least(lanes, run.n - i)), static_cast<int>(least(lanes, run.n - run.step - i)));
  }
  if (ACROSS) sums.across += across.sum();
  if (DOWN) sums.down += down.sum();
}

template <Penalty P, bool WEIGHTED, bool SIGNS, typename T>
void pair_run_of(const PairRun<T>& run, PairSums& sums) {
  if (run.has_across && run.above) return pair_run<P, WEIGHTED, SIGNS, true, true>(run, sums);
  if (run.has_across) return pair_run<P, WEIGHTED, SIGNS, true, false>(run, sums);
  if (run.above) pair_run<P, WEIGHTED, SIGNS, false, true>(run, sums);
}

template <typename T>
void add_pairs(const PairCall& call, const PairRun<T>& run, PairSums& sums) {
  const bool weighted = call.region != Region::image;
  if (call.penalty == Penalty::l2) {
    return weighted ? pair_run_of<Penalty::l2, true, false>(run, sums)
                    : pair_run_of<Penalty::l2, false, false>(run, sums);
  }
  if (call.signs == nullptr) {
    return weighted ? pair_run_of<Penalty::l1, true, false>(run, sums)
                    : pair_run_of<Penalty::l1, false, false>(run, sums);
  }
  weighted ? pair_run_of<Penalty::l1, true, true>(run, sums)
           : pair_run_of<Penalty::l1, false, true>(run, sums);
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
    const Unit unit(call, index);
    rows.begin(unit);
    PairSums sums;
    const int64_t last = least(unit.row_end + 1, call.rows);
    // Segment by segment: their rows lie a power of two apart, and fall on the same lines of the cache.
    for (int64_t s = 0; s < unit.segments(); ++s) {
      const int64_t segment = unit.segment_begin + s;
      const T* above = nullptr;
      for (int64_t y = unit.row_begin; y < last; ++y) {
        const bool own = y < unit.row_end;
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
          mix_row<true>(rows.pred(s, y), rows.target(s, y), mask.weights(y), n, call.mask_is_hole, row,
                        &sums.hole, &sums.valid, signs ? signs + 4 * groups : nullptr,
                        signs ? signs + 5 * groups : nullptr);
          image = row;
        } else if (!call.composite && call.pred_dtype == kNative<T>) {
          image = rows.pred(s, y);
        } else {
          image = image_row(call, rows, s, y);
        }
        PairRun<T> run{};
        run.image = image;
        run.above = above;
        if (call.region != Region::image) {
          run.first = mask.first(y);
          run.second = mask.second(y);
          if (above != nullptr) run.first_above = mask.first(y - 1);
        }
        run.n = n;
        run.step = call.step;
        run.has_across = own;
        run.across_signs = signs;
        if (above != nullptr && call.signs != nullptr) {
          run.down_signs = call.sign_row(unit.sample, segment, y - 1) + 2 * groups;
        }
        run.groups = groups;
        add_pairs(call, run, sums);
        above = image;
      }
    }
    call.sums[index] = sums;
  }
}

}  // namespace
}  // namespace IK_ISA
}  // namespace ik
