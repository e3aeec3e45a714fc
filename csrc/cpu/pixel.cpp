// CPU kernels of the pixel losses (masked_l1, hole_valid).
//
// Forward: every unit (see pixel.h) adds up weight * penalty(pred - target) and the weights of one or two
// regions, and packs the signs of the differences for l1. Backward: coefficient * weight * penalty'(d), from
// the signs for l1 and from pred and target otherwise. float32 is read in place; other types go through
// L1-resident buffers. Bytes an element, float32 and l1: forward 8.25 + mask, backward 4.25, as a mask of
// zeros and ones is not read again.
#include "cpu/pixel.h"

#include <type_traits>

#include "cpu/convert.h"
#include "cpu/vec.h"

namespace ik {
namespace IK_ISA {
namespace {

constexpr int64_t kChunk = PixelCall::chunk;
// Elements converted at a time: the buffers of two inputs and two outputs are half of a 32 KiB L1 cache.
constexpr int64_t kBlock = 1024;
// Gradients larger than this leave the cache anyway: written around it they spare the read for ownership.
constexpr int64_t kStreamBytes = int64_t(16) << 20;

// How far ahead the forward prefetches, in elements: one page of float32.
constexpr int64_t kPrefetch = 1024;

enum class Weights { none, mask, two_regions };

struct Totals {
  double sum[2] = {0, 0};
  double weight[2] = {0, 0};
};

template <typename V>
IK_INLINE void store_signs(uint8_t* signs, V d) {
  const uint32_t positive = d.positive_bits();
  const uint32_t negative = d.negative_bits();
  for (int g = 0; g < V::lanes / 8; ++g) {
    signs[2 * g] = static_cast<uint8_t>(positive >> (8 * g));
    signs[2 * g + 1] = static_cast<uint8_t>(negative >> (8 * g));
  }
}

// (hole, valid) weights from the mask value.
template <typename T>
IK_INLINE void split_regions(T mask, T one, bool mask_is_hole, T& hole, T& valid) {
  hole = mask_is_hole ? mask : one - mask;
  valid = mask_is_hole ? one - mask : mask;
}

template <typename T>
struct ForwardRun {
  const T* pred;
  const T* target;
  const T* weight;
  int64_t n;
  T param;
  bool mask_is_hole;
  uint8_t* signs;
  T* map;
};

// One step on a vector (V = Vec<T>) or on a single element (V = T) of a run.
template <Penalty P, Weights W, bool MAP, typename V>
IK_INLINE V forward_step(V pred, V target, V mask, V one, V param, bool mask_is_hole, V* sums, V* weights,
                         V& out) {
  V d = pred - target;
  if constexpr (W == Weights::mask) d = select_zero_(mask, d);
  const V value = penalty_value<P>(d, param);
  if constexpr (W == Weights::none) {
    out = value;
  } else if constexpr (W == Weights::mask) {
    out = value * mask;
    if constexpr (!MAP) weights[0] = weights[0] + mask;
  } else {
    V hole, valid;
    split_regions(mask, one, mask_is_hole, hole, valid);
    out = select_zero_(hole, value * hole);
    sums[1] = sums[1] + select_zero_(valid, value * valid);
    weights[0] = weights[0] + hole;
    weights[1] = weights[1] + valid;
  }
  if constexpr (!MAP) sums[0] = sums[0] + out;
  return d;
}

template <Penalty P, Weights W, bool MAP, bool SIGNS, typename T>
void forward_run(const ForwardRun<T>& run, Totals& totals) {
  using V = Vec<T>;
  const V one(T(1)), param(run.param);
  // Two independent sets of accumulators hide the latency of the additions.
  V sums[2][2] = {{V(T(0)), V(T(0))}, {V(T(0)), V(T(0))}};
  V weights[2][2] = {{V(T(0)), V(T(0))}, {V(T(0)), V(T(0))}};
  int64_t i = 0;
  for (; i + 2 * V::lanes <= run.n; i += 2 * V::lanes) {
    for (int u = 0; u < 2; ++u) {
      const int64_t at = i + u * V::lanes;
      // The hardware prefetchers stop at every 4 KiB page: 10 to 15 % of the forward on Zen 4.
      __builtin_prefetch(run.pred + at + kPrefetch);
      __builtin_prefetch(run.target + at + kPrefetch);
      V out;
      const V d = forward_step<P, W, MAP>(V::load(run.pred + at), V::load(run.target + at),
                                          W == Weights::none ? one : V::load(run.weight + at), one, param,
                                          run.mask_is_hole, sums[u], weights[u], out);
      if constexpr (MAP) out.store(run.map + at);
      if constexpr (SIGNS) store_signs(run.signs + at / 4, d);
    }
  }
  T tail_sums[2] = {T(0), T(0)};
  T tail_weights[2] = {T(0), T(0)};
  while (i < run.n) {
    const int64_t end = i + 8 < run.n ? i + 8 : run.n;
    uint32_t word = 0;
    for (int64_t at = i; at < end; ++at) {
      T out;
      const T d =
          forward_step<P, W, MAP>(run.pred[at], run.target[at], W == Weights::none ? T(1) : run.weight[at],
                                  T(1), run.param, run.mask_is_hole, tail_sums, tail_weights, out);
      if constexpr (MAP) run.map[at] = out;
      if constexpr (SIGNS) word |= sign_bits(d) << (at - i);
    }
    if constexpr (SIGNS) {
      run.signs[i / 4] = static_cast<uint8_t>(word);
      run.signs[i / 4 + 1] = static_cast<uint8_t>(word >> 8);
    }
    i = end;
  }
  if constexpr (!MAP) {
    constexpr int regions = W == Weights::two_regions ? 2 : 1;
    for (int r = 0; r < regions; ++r) {
      totals.sum[r] += (sums[0][r] + sums[1][r]).sum() + static_cast<double>(tail_sums[r]);
      if constexpr (W == Weights::none) {
        totals.weight[r] += static_cast<double>(run.n);
      } else {
        totals.weight[r] += (weights[0][r] + weights[1][r]).sum() + static_cast<double>(tail_weights[r]);
      }
    }
  }
}

template <typename T>
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
  T* grad_pred;
  T* grad_target;
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

template <Penalty P, Weights W, bool MAP, typename T>
void backward_run(const BackwardRun<T>& run) {
  using V = Vec<T>;
  const V one(T(1)), zero(T(0)), param(run.param), first(run.coefficient[0]), second(run.coefficient[1]);
  int64_t i = 0;
  for (; i + V::lanes <= run.n; i += V::lanes) {
    const V mask = W == Weights::none ? one : V::load(run.weight + i);
    const V c =
        backward_coefficient<W>(MAP ? V::load(run.grad + i) : first, second, mask, one, run.mask_is_hole);
    V out;
    if constexpr (P == Penalty::l1) {
      uint32_t positive = 0;
      uint32_t negative = 0;
      for (int g = 0; g < V::lanes / 8; ++g) {
        positive |= static_cast<uint32_t>(run.signs[i / 4 + 2 * g]) << (8 * g);
        negative |= static_cast<uint32_t>(run.signs[i / 4 + 2 * g + 1]) << (8 * g);
      }
      out = V::signed_by(positive, negative, c);
    } else {
      out = c * penalty_grad<P>(V::load(run.pred + i) - V::load(run.target + i), param);
      // A region without a gradient has coefficient 0, and NaN in it must not reach the gradient.
      if constexpr (W != Weights::none) out = select_zero_(W == Weights::mask ? mask : c, out);
    }
    if (run.stream) {
      if (run.grad_pred) out.stream(run.grad_pred + i);
      if (run.grad_target) (zero - out).stream(run.grad_target + i);
    } else {
      if (run.grad_pred) out.store(run.grad_pred + i);
      if (run.grad_target) (zero - out).store(run.grad_target + i);
    }
  }
  for (; i < run.n; ++i) {
    const T mask = W == Weights::none ? T(1) : run.weight[i];
    const T c = backward_coefficient<W>(MAP ? run.grad[i] : run.coefficient[0], run.coefficient[1], mask,
                                        T(1), run.mask_is_hole);
    T out;
    if constexpr (P == Penalty::l1) {
      const int64_t group = i / 8;
      const uint32_t word = run.signs[2 * group] | (static_cast<uint32_t>(run.signs[2 * group + 1]) << 8);
      out = apply_sign(word, static_cast<int>(i % 8), c);
    } else {
      out = c * penalty_grad<P>(run.pred[i] - run.target[i], run.param);
      if constexpr (W != Weights::none) out = select_zero_(W == Weights::mask ? mask : c, out);
    }
    if (run.grad_pred) run.grad_pred[i] = out;
    if (run.grad_target) run.grad_target[i] = T(0) - out;
  }
}

// Calls f<P>() for the run-time penalty.
template <typename F>
IK_INLINE void with_penalty(Penalty penalty, F&& f) {
  switch (penalty) {
    case Penalty::l1:
      return f(std::integral_constant<Penalty, Penalty::l1>());
    case Penalty::l2:
      return f(std::integral_constant<Penalty, Penalty::l2>());
    case Penalty::charbonnier:
      return f(std::integral_constant<Penalty, Penalty::charbonnier>());
    case Penalty::huber:
      return f(std::integral_constant<Penalty, Penalty::huber>());
  }
}

template <typename T>
void forward_dispatch(const PixelCall& call, const ForwardRun<T>& run, Totals& totals) {
  with_penalty(call.penalty, [&](auto p) {
    constexpr Penalty P = decltype(p)::value;
    auto signed_or_not = [&](auto signs) {
      constexpr bool S = decltype(signs)::value;
      if (call.regions == 2) {
        forward_run<P, Weights::two_regions, false, S>(run, totals);
      } else if (run.weight != nullptr) {
        if (run.map != nullptr) {
          forward_run<P, Weights::mask, true, S>(run, totals);
        } else {
          forward_run<P, Weights::mask, false, S>(run, totals);
        }
      } else if (run.map != nullptr) {
        forward_run<P, Weights::none, true, S>(run, totals);
      } else {
        forward_run<P, Weights::none, false, S>(run, totals);
      }
    };
    if constexpr (P == Penalty::l1) {
      if (run.signs != nullptr) return signed_or_not(std::true_type());
    }
    signed_or_not(std::false_type());
  });
}

template <typename T>
void backward_dispatch(const PixelCall& call, const BackwardRun<T>& run) {
  with_penalty(call.penalty, [&](auto p) {
    constexpr Penalty P = decltype(p)::value;
    if (call.regions == 2) {
      backward_run<P, Weights::two_regions, false>(run);
    } else if (run.weight != nullptr) {
      if (run.grad != nullptr) {
        backward_run<P, Weights::mask, true>(run);
      } else {
        backward_run<P, Weights::mask, false>(run);
      }
    } else if (run.grad != nullptr) {
      backward_run<P, Weights::none, true>(run);
    } else {
      backward_run<P, Weights::none, false>(run);
    }
  });
}

constexpr Dtype dtype_of(const float*) { return Dtype::f32; }
constexpr Dtype dtype_of(const double*) { return Dtype::f64; }

// `n` elements at `offset` of `data` as T: in place when stored as T, else converted into `buffer`.
template <typename T>
const T* fetch(const void* data, Dtype dtype, int64_t offset, int64_t n, T* buffer) {
  if (dtype == Dtype::bits) {
    unpack_bits(static_cast<const uint8_t*>(data) + offset / 8, n, buffer);
    return buffer;
  }
  const char* at = static_cast<const char*>(data) + offset * dtype_bytes(dtype);
  if (dtype == dtype_of(buffer)) return reinterpret_cast<const T*>(at);
  convert_to(dtype, at, n, buffer);
  return buffer;
}

// Mask values of elements start .. start + n of segment (sample, segment).
template <typename T>
const T* fetch_mask(const PixelCall& call, int64_t sample, int64_t segment, int64_t start, int64_t n,
                    T* buffer) {
  const PixelShape& shape = call.shape;
  const int64_t base = sample * shape.mask_stride_n + segment * shape.mask_stride_c;
  const int64_t repeat = shape.mask_repeat;
  if (repeat == 1) return fetch(call.mask, call.mask_dtype, base + start, n, buffer);
  T pixels[kChunk];
  const int64_t first = start / repeat;
  const T* value =
      fetch(call.mask, call.mask_dtype, base + first, (start + n - 1) / repeat - first + 1, pixels);
  int64_t i = 0;
  int64_t place = start - first * repeat;
  if (repeat == 3) {  // photographs
    for (; place != 0 && i < n; ++i) {
      buffer[i] = *value;
      if (++place == 3) place = 0, ++value;
    }
    const int64_t whole = (n - i) / 3;
    triple(value, whole, buffer + i);
    i += 3 * whole;
    value += whole;
  }
  while (i < n) {
    const int64_t stop = i + repeat - place < n ? i + repeat - place : n;
    for (; i < stop; ++i) buffer[i] = *value;
    ++value;
    place = 0;
  }
  return buffer;
}

struct Unit {
  int64_t sample, segment_begin, segment_end, start, n;
  Unit(const PixelCall& call, int64_t unit) {
    const int64_t chunks = call.chunks();
    const int64_t groups = call.segment_groups();
    start = unit % chunks * kChunk;
    n = call.shape.length - start < kChunk ? call.shape.length - start : kChunk;
    segment_begin = unit / chunks % groups * PixelCall::unit_segments;
    segment_end = segment_begin + PixelCall::unit_segments;
    if (segment_end > call.shape.segments) segment_end = call.shape.segments;
    sample = unit / chunks / groups;
  }
};

// Whether all weights are 0 or 1; packs them into `bits` unless null.
template <typename T>
bool pack_binary(const T* weight, int64_t n, uint8_t* bits) {
  using V = Vec<T>;
  // w^2 - w is 0 for 0 and 1 alone; NaN and Inf make it NaN.
  V off(T(0));
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    const V w = V::load(weight + i);
    off = off + abs_(w * w - w);
    if (bits == nullptr) continue;
    const uint32_t word = w.positive_bits();
    for (int g = 0; g < V::lanes / 8; ++g) bits[i / 8 + g] = static_cast<uint8_t>(word >> (8 * g));
  }
  double rest = 0;
  while (i < n) {
    const int64_t end = i + 8 < n ? i + 8 : n;
    uint32_t word = 0;
    for (int64_t at = i; at < end; ++at) {
      rest += std::fabs(weight[at] * weight[at] - weight[at]);
      word |= uint32_t(weight[at] > T(0)) << (at - i);
    }
    if (bits != nullptr) bits[i / 8] = static_cast<uint8_t>(word);
    i = end;
  }
  return off.sum() + rest == 0;
}

// Calls f(sample, row, weight) for every (segment, prediction) of a unit; row counts the segments of pred.
template <typename T, typename F>
IK_INLINE void for_each_run(const PixelCall& call, const Unit& unit, T* mask_buffer, F&& f) {
  const PixelShape& shape = call.shape;
  const int64_t samples = shape.samples / call.copies;
  const T* weight = nullptr;
  for (int64_t segment = unit.segment_begin; segment < unit.segment_end; ++segment) {
    for (int64_t copy = 0; copy < call.copies; ++copy) {
      const int64_t sample = copy * samples + unit.sample;
      if (shape.has_mask && (weight == nullptr || shape.mask_stride_c != 0 || call.mask_per_copy)) {
        weight = fetch_mask(call, call.mask_per_copy ? sample : unit.sample, segment, unit.start, unit.n,
                            mask_buffer);
        if (call.binary != nullptr) {
          uint8_t* bits = call.mask_bits != nullptr && segment == 0
                              ? call.mask_bits + sample * shape.groups() + unit.start / 8
                              : nullptr;
          if (!pack_binary(weight, unit.n, bits)) __atomic_store_n(call.binary, 0, __ATOMIC_RELAXED);
        }
      }
      f(sample, sample * shape.segments + segment, weight);
    }
  }
}

// Calls f(begin, n) for the blocks of a unit: the whole unit where nothing needs converting.
template <typename T, typename F>
IK_INLINE void for_each_block(const PixelCall& call, const Unit& unit, F&& f) {
  constexpr Dtype stored = dtype_of(static_cast<const T*>(nullptr));
  const bool in_place = call.pred_dtype == stored && call.target_dtype == stored &&
                        call.grad_pred_dtype == stored && call.grad_target_dtype == stored;
  const int64_t step = in_place ? kChunk : kBlock;
  for (int64_t begin = 0; begin < unit.n; begin += step) {
    f(begin, unit.n - begin < step ? unit.n - begin : step);
  }
}

template <typename T>
void forward_units(const PixelCall& call, int64_t unit_begin, int64_t unit_end) {
  alignas(64) T pred[kBlock], target[kBlock], mask_buffer[kChunk];
  const int64_t target_segments = call.shape.samples / call.copies * call.shape.segments;
  for (int64_t index = unit_begin; index < unit_end; ++index) {
    const Unit unit(call, index);
    Totals totals;
    for_each_run(call, unit, mask_buffer, [&](int64_t, int64_t row, const T* weight) {
      for_each_block<T>(call, unit, [&](int64_t begin, int64_t n) {
        const int64_t start = unit.start + begin;
        const int64_t offset = row * call.shape.length + start;
        ForwardRun<T> run;
        run.pred = fetch(call.pred, call.pred_dtype, offset, n, pred);
        run.target = fetch(call.target, call.target_dtype, row % target_segments * call.shape.length + start,
                           n, target);
        run.weight = weight ? weight + begin : nullptr;
        run.n = n;
        run.param = static_cast<T>(call.param);
        run.mask_is_hole = call.mask_is_hole;
        run.signs = call.signs ? call.signs + 2 * row * call.shape.groups() + start / 4 : nullptr;
        run.map = call.map ? static_cast<T*>(call.map) + offset : nullptr;
        forward_dispatch(call, run, totals);
      });
    });
    if (call.partials != nullptr) {
      double* out = call.partials + 4 * index;
      for (int r = 0; r < 2; ++r) {
        out[2 * r] = totals.sum[r];
        out[2 * r + 1] = totals.weight[r];
      }
    }
  }
}

template <typename T>
T* output_at(void* data, Dtype dtype, int64_t offset, T* buffer) {
  if (data == nullptr) return nullptr;
  return dtype == dtype_of(buffer) ? static_cast<T*>(data) + offset : buffer;
}

template <typename T>
void store_output(void* data, Dtype dtype, int64_t offset, int64_t n, const T* buffer) {
  if (data == nullptr || dtype == dtype_of(buffer)) return;
  convert_from(dtype, buffer, n, static_cast<char*>(data) + offset * dtype_bytes(dtype));
}

IK_INLINE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

template <typename T>
void backward_units(const PixelCall& call, int64_t unit_begin, int64_t unit_end) {
  alignas(64) T pred[kBlock], target[kBlock], mask_buffer[kChunk], grad_pred[kBlock], grad_target[kBlock];
  const int64_t target_segments = call.shape.samples / call.copies * call.shape.segments;
  const bool large = call.shape.numel() * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  for (int64_t index = unit_begin; index < unit_end; ++index) {
    const Unit unit(call, index);
    for_each_run(call, unit, mask_buffer, [&](int64_t sample, int64_t row, const T* weight) {
      for_each_block<T>(call, unit, [&](int64_t begin, int64_t n) {
        const int64_t start = unit.start + begin;
        const int64_t offset = row * call.shape.length + start;
        BackwardRun<T> run;
        run.pred = call.pred ? fetch(call.pred, call.pred_dtype, offset, n, pred) : nullptr;
        run.target = call.target ? fetch(call.target, call.target_dtype,
                                         row % target_segments * call.shape.length + start, n, target)
                                 : nullptr;
        run.weight = weight ? weight + begin : nullptr;
        run.grad = call.grad_map ? static_cast<const T*>(call.grad_map) + offset : nullptr;
        run.n = n;
        for (int r = 0; r < 2; ++r) {
          const bool given = r < call.regions && call.coefficient != nullptr;
          run.coefficient[r] = given ? static_cast<T>(call.coefficient[sample * call.regions + r]) : T(0);
        }
        run.param = static_cast<T>(call.param);
        run.mask_is_hole = call.mask_is_hole;
        run.signs = call.signs ? call.signs + 2 * row * call.shape.groups() + start / 4 : nullptr;
        run.grad_pred = output_at(call.grad_pred, call.grad_pred_dtype, offset, grad_pred);
        run.grad_target = output_at(call.grad_target, call.grad_target_dtype, offset, grad_target);
        run.stream = large && aligned(run.grad_pred) && aligned(run.grad_target) &&
                     run.grad_pred != grad_pred && run.grad_target != grad_target;
        backward_dispatch(call, run);
        store_output(call.grad_pred, call.grad_pred_dtype, offset, n, grad_pred);
        store_output(call.grad_target, call.grad_target_dtype, offset, n, grad_target);
      });
    });
  }
#if defined(IK_ISA_AVX512) || defined(IK_ISA_AVX2)
  if (large) _mm_sfence();
#endif
}

}  // namespace

const PixelKernels pixel_kernels = {forward_units<float>, backward_units<float>};
#if defined(IK_ISA_GENERIC)
// float64 is for checking, not for speed: one build of it is enough.
const PixelKernels pixel_kernels_wide = {forward_units<double>, backward_units<double>};
#endif

}  // namespace IK_ISA
}  // namespace ik
