// CPU kernels over neighbouring pixels (total_variation, inpainting_pixel).
//
// One pass over the rows: the composite of a row is formed in the first-level cache, where the row above it
// still lies, so that hole, valid and total variation cost one read of the images. Backward: from the packed
// signs, without the images for l1. Bytes an element, float32 and l1 with a mask of zeros and ones:
// forward 8.75 + mask, backward 4.75 + a bit of the mask.
#include "cpu/pairs.h"

#include "cpu/pairs_rows.h"

namespace ik {
namespace IK_ISA {
namespace {

// The segments of one sample and the rows one call works on.
struct Unit {
  int64_t sample, segment_begin, segment_end, row_begin, row_end;
  Unit(const PairCall& call, int64_t unit) {
    const int64_t chunks = call.chunks();
    const int64_t groups = call.segment_groups();
    row_begin = unit % chunks * call.unit_rows();
    row_end = least(row_begin + call.unit_rows(), call.rows);
    segment_begin = unit / chunks % groups * PairCall::unit_segments;
    segment_end = least(segment_begin + PairCall::unit_segments, call.shape.segments);
    sample = unit / chunks / groups;
  }
  int64_t segments() const { return segment_end - segment_begin; }
};

template <int LANES>
IK_INLINE void store_bits(uint32_t bits, uint8_t* plane, int64_t i, int count) {
  if (count == LANES) {
    std::memcpy(plane + i / 8, &bits, LANES / 8);
  } else {
    for (int g = 0; 8 * g < count; ++g) plane[i / 8 + g] = static_cast<uint8_t>(bits >> (8 * g));
  }
}
template <int LANES>
IK_INLINE uint32_t load_bits(const uint8_t* plane, int64_t i, int count) {
  uint32_t bits = 0;
  if (count == LANES) {
    std::memcpy(&bits, plane + i / 8, LANES / 8);
  } else {
    for (int g = 0; 8 * g < count; ++g) bits |= static_cast<uint32_t>(plane[i / 8 + g]) << (8 * g);
  }
  return bits;
}

// `n` elements at `offset` of `data`, in place when stored as T, else converted into `buffer`.
template <typename T>
const T* fetch_row(const void* data, Dtype dtype, int64_t offset, int64_t n, T* buffer) {
  if (dtype == kNative<T>) return static_cast<const T*>(data) + offset;
  convert_to(dtype, static_cast<const char*>(data) + offset * dtype_bytes(dtype), n, buffer);
  return buffer;
}

// Everything a range of units works with, allocated once.
template <typename T>
class Rows {
 public:
  explicit Rows(const PairCall& call)
      : call_(call),
        masks_{MaskRows<T>(call), MaskRows<T>(call), MaskRows<T>(call), MaskRows<T>(call)},
        images_{ring(), ring(), ring(), ring()},
        pred_(call.width),
        target_(call.width) {}

  void begin(const Unit& unit) {
    unit_ = unit;
    for (int64_t i = 0; i < unit.segments(); ++i) {
      masks_[i].begin(unit.sample, unit.segment_begin + i);
      images_[i].reset();
    }
  }
  // Of a segment, counted from the first of the unit; the first one's if they share it.
  MaskRows<T>& mask(int64_t segment) { return masks_[call_.shape.mask_stride_c == 0 ? 0 : segment]; }

  int64_t offset(int64_t segment, int64_t y) const {
    const int64_t row = unit_.sample * call_.shape.segments + unit_.segment_begin + segment;
    return (row * call_.rows + y) * call_.width;
  }
  const T* pred(int64_t segment, int64_t y) {
    return fetch_row(call_.pred, call_.pred_dtype, offset(segment, y), call_.width, pred_.get());
  }
  const T* target(int64_t segment, int64_t y) {
    return fetch_row(call_.target, call_.target_dtype, offset(segment, y), call_.width, target_.get());
  }
  // The buffer of a row of the image whose total variation is wanted.
  T* image_slot(int64_t segment, int64_t y, bool& ready) { return images_[segment].slot(y, ready); }
  const T* image_beyond(int64_t segment) { return images_[segment].zeros(); }

 private:
  RowRing<T> ring() const { return RowRing<T>(call_.width, call_.step + 16); }
  const PairCall& call_;
  Unit unit_{call_, 0};
  MaskRows<T> masks_[PairCall::unit_segments];
  RowRing<T> images_[PairCall::unit_segments];
  Scratch<T> pred_, target_;
};

// Writes a row of the composite; adds up hole and valid terms and packs the signs of pred - target if LOSSES.
template <bool LOSSES, typename T>
void mix_row(const T* pred, const T* target, const T* mask, int64_t n, bool mask_is_hole, T* out,
             double* hole_sum, double* valid_sum, uint8_t* positive, uint8_t* negative) {
  using V = Vec<T>;
  const V one(T(1));
  V hole_acc(T(0)), valid_acc(T(0));
  for_each_vector<V>(n, [&](int64_t i, int count) {
    prefetch(pred + i);
    prefetch(target + i);
    const V p = load_part<V>(pred + i, count);
    const V t = load_part<V>(target + i, count);
    V hole, valid;
    split_regions(load_part<V>(mask + i, count), one, mask_is_hole, hole, valid);
    store_part(select_zero_(hole, hole * p) + select_zero_(valid, valid * t), out + i, count);
    if constexpr (LOSSES) {
      const V d = p - t;
      const V value = abs_(d);
      hole_acc = hole_acc + select_zero_(hole, hole * value);
      valid_acc = valid_acc + select_zero_(valid, valid * value);
      if (positive != nullptr) {
        store_bits<V::lanes>(d.positive_bits(), positive, i, count);
        store_bits<V::lanes>(d.negative_bits(), negative, i, count);
      }
    }
  });
  if constexpr (LOSSES) {
    *hole_sum += hole_acc.sum();
    *valid_sum += valid_acc.sum();
  }
}

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
  V d = load_part<V>(next + i, count) - load_part<V>(here + i, count);
  V value;
  if constexpr (WEIGHTED) {
    const V weight = load_part<V>(first + i, count) * load_part<V>(second + i, count);
    d = select_zero_(weight, d);
    value = penalty_value<P>(d, d) * weight;
  } else {
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

// A row of the image whose total variation is wanted, without its losses.
template <typename T>
const T* image_row(const PairCall& call, Rows<T>& rows, int64_t segment, int64_t y) {
  bool ready;
  T* row = rows.image_slot(segment, y, ready);
  if (ready) return row;
  const T* pred = rows.pred(segment, y);
  if (call.composite) {
    mix_row<false>(pred, rows.target(segment, y), rows.mask(segment).weights(y), call.width,
                   call.mask_is_hole, row, static_cast<double*>(nullptr), static_cast<double*>(nullptr),
                   static_cast<uint8_t*>(nullptr), static_cast<uint8_t*>(nullptr));
  } else {
    std::memcpy(row, pred, static_cast<size_t>(call.width) * sizeof(T));
  }
  return row;
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

// A plane of signs shifted by `step` elements: bit i is that of element i - step, 0 before the first.
class ShiftedBits {
 public:
  ShiftedBits(int64_t groups, int64_t step)
      : front_((step + 7) / 8), at_(8 * front_ - step), groups_(groups), bytes_(front_ + groups + 8) {
    std::memset(bytes_.get(), 0, static_cast<size_t>(front_ + groups + 8));
  }
  void set(const uint8_t* plane) { std::memcpy(bytes_.get() + front_, plane, static_cast<size_t>(groups_)); }
  IK_MEMBER uint32_t at(int64_t i) {
    uint32_t word;
    std::memcpy(&word, bytes_.get() + (at_ + i) / 8, 4);
    return word >> ((at_ + i) % 8);
  }

 private:
  int64_t front_, at_, groups_;
  Scratch<uint8_t> bytes_;
};

// The sign planes a row's l1 gradient is made of.
struct SignRows {
  const uint8_t* own;    // planes of the row, `groups` bytes each
  const uint8_t* above;  // planes 2 and 3 of the row above, zeros at the top
  int64_t groups;
  ShiftedBits* left_positive;
  ShiftedBits* left_negative;
};

// Weights of the four pairs of a pixel: row of this pixel, of the one above and of the one below.
template <typename T>
struct PairRows {
  const T *first, *first_above, *second, *second_below;
};

// Gradients of one row.
template <typename T>
struct GradientRow {
  const T* mask;
  int64_t n, step;
  T hole, valid, down, across;
  bool mask_is_hole;
  T* grad_pred;
  T* grad_target;
  bool stream;
};

// From the gradient of the image: that of pred and target.
template <bool COMPOSITE, bool LOSSES, typename T>
IK_INLINE void write_gradient(const GradientRow<T>& row, Vec<T> image, uint32_t positive, uint32_t negative,
                              int64_t i, int count) {
  using V = Vec<T>;
  V to_pred = image;
  V to_target(T(0));
  if constexpr (COMPOSITE) {
    V hole, valid;
    split_regions(load_part<V>(row.mask + i, count), V(T(1)), row.mask_is_hole, hole, valid);
    to_pred = select_zero_(hole, hole * image);
    to_target = select_zero_(valid, valid * image);
    if constexpr (LOSSES) {
      const V weight = select_zero_(hole, hole * V(row.hole)) + select_zero_(valid, valid * V(row.valid));
      const V pixel = V::signed_by(positive, negative, weight);
      to_pred = to_pred + pixel;
      to_target = to_target - pixel;
    }
  }
  const bool stream = row.stream && count == V::lanes;
  if (row.grad_pred)
    stream ? to_pred.stream(row.grad_pred + i) : store_part(to_pred, row.grad_pred + i, count);
  if (row.grad_target)
    stream ? to_target.stream(row.grad_target + i) : store_part(to_target, row.grad_target + i, count);
}

template <bool WEIGHTED, bool COMPOSITE, bool LOSSES, typename T>
void sign_gradient(const GradientRow<T>& row, const SignRows& signs, const PairRows<T>& pairs) {
  using V = Vec<T>;
  constexpr int lanes = V::lanes;
  const V down(row.down), across(row.across);
  const uint8_t* plane = signs.own;
  for_each_vector<V>(row.n, [&](int64_t i, int count) {
    const auto bits = [&](const uint8_t* from, int64_t p) {
      return load_bits<lanes>(from + p * signs.groups, i, count);
    };
    V left = across, right = across, upper = down, lower = down;
    if constexpr (WEIGHTED) {
      const V first = load_part<V>(pairs.first + i, count);
      const V second = load_part<V>(pairs.second + i, count);
      left = left * load_part<V>(pairs.first + i - row.step, count) * second;
      right = right * first * load_part<V>(pairs.second + i + row.step, count);
      upper = upper * load_part<V>(pairs.first_above + i, count) * second;
      lower = lower * first * load_part<V>(pairs.second_below + i, count);
    }
    // + the pairs that end here, - those that begin here.
    const V ends = V::signed_by(signs.left_positive->at(i), signs.left_negative->at(i), left) +
                   V::signed_by(bits(signs.above, 0), bits(signs.above, 1), upper);
    const V begins = V::signed_by(bits(plane, 0), bits(plane, 1), right) +
                     V::signed_by(bits(plane, 2), bits(plane, 3), lower);
    write_gradient<COMPOSITE, LOSSES>(row, ends - begins, LOSSES ? bits(plane, 4) : 0,
                                      LOSSES ? bits(plane, 5) : 0, i, count);
  });
}

// l2: from three rows of the image.
template <bool COMPOSITE, typename T>
void square_gradient(const GradientRow<T>& row, const T* above, const T* image, const T* below,
                     const PairRows<T>& pairs) {
  using V = Vec<T>;
  const V down(row.down + row.down), across(row.across + row.across);
  for_each_vector<V>(row.n, [&](int64_t i, int count) {
    const V here = load_part<V>(image + i, count);
    const V first = load_part<V>(pairs.first + i, count);
    const V second = load_part<V>(pairs.second + i, count);
    const auto pair = [&](V weight, V d) { return select_zero_(weight, weight * d); };
    const V left = pair(load_part<V>(pairs.first + i - row.step, count) * second,
                        here - load_part<V>(image + i - row.step, count));
    const V right = pair(first * load_part<V>(pairs.second + i + row.step, count),
                         load_part<V>(image + i + row.step, count) - here);
    const V upper =
        pair(load_part<V>(pairs.first_above + i, count) * second, here - load_part<V>(above + i, count));
    const V lower =
        pair(first * load_part<V>(pairs.second_below + i, count), load_part<V>(below + i, count) - here);
    write_gradient<COMPOSITE, false>(row, across * (left - right) + down * (upper - lower), 0, 0, i, count);
  });
}

IK_INLINE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

template <typename T>
void backward_units(const PairCall& call, int64_t unit_begin, int64_t unit_end) {
  Rows<T> rows(call);
  const int64_t groups = call.groups();
  const int64_t n = call.width;
  const bool l1 = call.penalty == Penalty::l1;
  Scratch<T> pred_buffer(n), target_buffer(n);
  Scratch<uint8_t> nothing(2 * groups);
  std::memset(nothing.get(), 0, static_cast<size_t>(2 * groups));
  ShiftedBits left_positive(groups, call.step), left_negative(groups, call.step);
  const auto output = [&](void* data, Dtype dtype, int64_t offset, T* buffer) {
    if (data == nullptr) return static_cast<T*>(nullptr);
    return dtype == kNative<T> ? static_cast<T*>(data) + offset : buffer;
  };
  const auto finish = [&](void* data, Dtype dtype, int64_t offset, const T* buffer) {
    if (data == nullptr || dtype == kNative<T>) return;
    convert_from(dtype, buffer, n, static_cast<char*>(data) + offset * dtype_bytes(dtype));
  };
  for (int64_t index = unit_begin; index < unit_end; ++index) {
    const Unit unit(call, index);
    rows.begin(unit);
    const PairCoefficients& c = call.coefficients[unit.sample];
    for (int64_t s = 0; s < unit.segments(); ++s) {
      const int64_t segment = unit.segment_begin + s;
      for (int64_t y = unit.row_begin; y < unit.row_end; ++y) {
        const int64_t offset = rows.offset(s, y);
        MaskRows<T>& mask = rows.mask(s);
        PairRows<T> pairs{};
        if (call.pair_weights || !l1) {
          pairs = {mask.first(y), mask.first(y - 1), mask.second(y), mask.second(y + 1)};
        }
        GradientRow<T> row;
        row.mask = call.composite ? mask.weights(y) : nullptr;
        row.n = n;
        row.step = call.step;
        row.hole = static_cast<T>(c.hole);
        row.valid = static_cast<T>(c.valid);
        row.down = static_cast<T>(c.down);
        row.across = static_cast<T>(c.across);
        row.mask_is_hole = call.mask_is_hole;
        row.grad_pred = output(call.grad_pred, call.pred_dtype, offset, pred_buffer.get());
        row.grad_target = output(call.grad_target, call.target_dtype, offset, target_buffer.get());
        row.stream = call.stream && aligned(row.grad_pred) && aligned(row.grad_target) &&
                     row.grad_pred != pred_buffer.get() && row.grad_target != target_buffer.get();
        if (l1) {
          SignRows signs{call.sign_row(unit.sample, segment, y), nothing.get(), groups, &left_positive,
                         &left_negative};
          if (y > 0) signs.above = call.sign_row(unit.sample, segment, y - 1) + 2 * groups;
          left_positive.set(signs.own);
          left_negative.set(signs.own + groups);
          if (call.losses) {
            call.pair_weights ? sign_gradient<true, true, true>(row, signs, pairs)
                              : sign_gradient<false, true, true>(row, signs, pairs);
          } else if (call.composite) {
            call.pair_weights ? sign_gradient<true, true, false>(row, signs, pairs)
                              : sign_gradient<false, true, false>(row, signs, pairs);
          } else {
            call.pair_weights ? sign_gradient<true, false, false>(row, signs, pairs)
                              : sign_gradient<false, false, false>(row, signs, pairs);
          }
        } else {
          const T* above = y > 0 ? image_row(call, rows, s, y - 1) : rows.image_beyond(s);
          const T* image = image_row(call, rows, s, y);
          const T* below = y + 1 < call.rows ? image_row(call, rows, s, y + 1) : rows.image_beyond(s);
          call.composite ? square_gradient<true>(row, above, image, below, pairs)
                         : square_gradient<false>(row, above, image, below, pairs);
        }
        finish(call.grad_pred, call.pred_dtype, offset, pred_buffer.get());
        finish(call.grad_target, call.target_dtype, offset, target_buffer.get());
      }
    }
  }
#if defined(IK_ISA_AVX512) || defined(IK_ISA_AVX2)
  if (call.stream) _mm_sfence();
#endif
}

}  // namespace

const PairKernels pair_kernels = {forward_units<float>, backward_units<float>};
#if defined(IK_ISA_GENERIC)
// float64 is for checking, not for speed: one build of it is enough.
const PairKernels pair_kernels_wide = {forward_units<double>, backward_units<double>};
#endif

}  // namespace IK_ISA
}  // namespace ik
