// CPU kernels of the pixel losses (masked_l1, hole_valid).
//
// Forward: every unit (see pixel.h) adds up weight * penalty(pred - target) and the weights of one or two
// regions, and packs the signs of the differences for l1. Backward: coefficient * weight * penalty'(d), from
// the signs for l1 and from pred and target otherwise. float32 is read in place; other types go through
// L1-resident buffers. Bytes an element, float32 and l1: forward 8.25 + mask, backward 4.25, as a mask of
// zeros and ones is not read again.
#include "cpu/pixel.h"

#include <type_traits>

#include "cpu/isa/pixel_backward.h"

namespace ik::IK_ISA {
namespace {

constexpr int64_t kChunk = PixelCall::chunk;
// Elements converted at a time: the buffers of two inputs and two outputs are half of a 32 KiB L1 cache.
constexpr int64_t kBlock = 1024;

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

template <Penalty P, bool MAP, bool SIGNS, typename S, typename T, int K>
void forward_weights(const PixelCall& call, const ForwardRun<S, T, K>& run, bool binary, double* sum) {
  if (run.weight == nullptr) return forward_run<P, Weights::none, MAP, SIGNS>(run, sum);
  if (call.regions == 1) {
    if (binary) return forward_run<P, Weights::binary_mask, MAP, SIGNS>(run, sum);
    return forward_run<P, Weights::mask, MAP, SIGNS>(run, sum);
  }
  if constexpr (!MAP) {
    if (binary) return forward_run<P, Weights::two_binary_regions, MAP, SIGNS>(run, sum);
    forward_run<P, Weights::two_regions, MAP, SIGNS>(run, sum);
  }
}

// S: the stored type of pred and target.
template <typename S, typename T, int K>
void forward_dispatch(const PixelCall& call, const ForwardRun<S, T, K>& run, bool binary, double* sum) {
  if constexpr (K > 1) {
    forward_weights<Penalty::l1, false, true>(call, run, binary, sum);
  } else if constexpr (!std::is_same<S, T>::value) {
    if (run.signs[0] != nullptr) return forward_weights<Penalty::l1, false, true>(call, run, binary, sum);
    forward_weights<Penalty::l1, false, false>(call, run, binary, sum);
  } else {
    with_penalty(call.penalty, [&](auto p) {
      constexpr Penalty P = decltype(p)::value;
      if constexpr (P == Penalty::l1) {
        if (run.signs[0] != nullptr && run.map != nullptr)
          return forward_weights<P, true, true>(call, run, binary, sum);
        if (run.signs[0] != nullptr) return forward_weights<P, false, true>(call, run, binary, sum);
      }
      if (run.map != nullptr) return forward_weights<P, true, false>(call, run, binary, sum);
      forward_weights<P, false, false>(call, run, binary, sum);
    });
  }
}

// S: the stored type of the gradients.
template <typename S, typename T>
void backward_dispatch(const PixelCall& call, const BackwardRun<S, T>& run) {
  const auto weights = [&](auto p) {
    constexpr Penalty P = decltype(p)::value;
    if (call.regions == 2) return backward_run<P, Weights::two_regions, false>(run);
    with_bool(run.grad != nullptr, [&](auto map) {
      constexpr bool MAP = decltype(map)::value;
      run.weight != nullptr ? backward_run<P, Weights::mask, MAP>(run)
                            : backward_run<P, Weights::none, MAP>(run);
    });
  };
  if constexpr (!std::is_same<S, T>::value) {
    weights(std::integral_constant<Penalty, Penalty::l1>());
  } else {
    with_penalty(call.penalty, weights);
  }
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
  const int64_t head = (first + 1) * repeat - start;  // elements left of the first pixel
  if (head < repeat) {
    for (; i < n && i < head; ++i) buffer[i] = *value;
    ++value;
  }
  const int64_t whole = (n - i) / repeat;
  repeat_each(value, whole, repeat, buffer + i);
  for (i += whole * repeat; i < n; ++i) buffer[i] = value[whole];
  return buffer;
}

// The weights of a run, null without a mask, and what is known of them.
template <typename T>
struct RunMask {
  const T* weight = nullptr;
  MaskScan scan;
};

// Calls f(sample, row, mask) for every (segment, K predictions) of a unit; row counts the segments of pred.
template <bool SCAN, int K, typename T, typename F>
IK_INLINE void for_each_run(const PixelCall& call, const Unit& unit, T* mask_buffer, F&& f) {
  const PixelShape& shape = call.shape;
  const int64_t samples = shape.samples / call.predictions;
  RunMask<T> mask;
  for (int64_t segment = unit.segment_begin; segment < unit.segment_end; ++segment) {
    for (int64_t prediction = 0; prediction < call.predictions; prediction += K) {
      const int64_t sample = prediction * samples + unit.sample;
      if (shape.has_mask &&
          (mask.weight == nullptr || shape.mask_stride_c != 0 || call.mask_per_prediction)) {
        mask.weight = fetch_mask(call, call.mask_per_prediction ? sample : unit.sample, segment, unit.begin,
                                 unit.end - unit.begin, mask_buffer);
        if constexpr (SCAN) {
          uint8_t* bits = call.mask_bits != nullptr && segment == 0
                              ? call.mask_bits + sample * shape.groups() + unit.begin / 8
                              : nullptr;
          mask.scan = scan_mask(mask.weight, unit.end - unit.begin, bits);
          if (call.binary != nullptr && !mask.scan.binary) __atomic_store_n(call.binary, 0, __ATOMIC_RELAXED);
        }
      }
      f(sample, sample * shape.segments + segment, mask);
    }
  }
}

// Calls f(start, n) for the blocks of a unit: the whole unit where nothing needs converting.
template <typename F>
IK_INLINE void for_each_block(const Unit& unit, bool in_place, F&& f) {
  const int64_t step = in_place ? kChunk : kBlock;
  for (int64_t begin = unit.begin; begin < unit.end; begin += step) f(begin, least(step, unit.end - begin));
}

// S: the type pred and target are stored in, or T for any: then others are converted in blocks. K:
// predictions that pass over the target together, each a stream of reads of its own.
template <typename S, typename T, int K>
void forward_units_of(const PixelCall& call, int64_t unit_begin, int64_t unit_end) {
  constexpr Dtype stored = kNative<S>;
  const bool in_place = call.pred_dtype == stored && call.target_dtype == stored;
  alignas(64) T mask_buffer[kChunk];
  alignas(64) S pred[kBlock], target[kBlock];
  const int64_t target_rows = call.shape.samples / call.predictions * call.shape.segments;
  for (int64_t index = unit_begin; index < unit_end; ++index) {
    const Unit unit = call.unit(index);
    double sum[2] = {0, 0};
    double weight[2] = {0, 0};
    for_each_run<true, K>(call, unit, mask_buffer, [&](int64_t, int64_t row, const RunMask<T>& mask) {
      const bool swapped = call.regions == 2 && !call.mask_is_hole;
      weight[swapped ? 1 : 0] +=
          K * (mask.weight ? mask.scan.weight : static_cast<double>(unit.end - unit.begin));
      weight[swapped ? 0 : 1] += K * mask.scan.rest;
      for_each_block(unit, in_place, [&](int64_t start, int64_t n) {
        const int64_t target_offset = row % target_rows * call.shape.length + start;
        ForwardRun<S, T, K> run;
        run.target = fetch(call.target, call.target_dtype, target_offset, n, target);
        run.weight = mask.weight ? mask.weight + (start - unit.begin) : nullptr;
        run.n = n;
        run.param = static_cast<T>(call.param);
        run.mask_is_hole = call.mask_is_hole;
        for (int k = 0; k < K; ++k) {
          const int64_t prediction_row = row + k * target_rows;
          const int64_t offset = prediction_row * call.shape.length + start;
          run.pred[k] = fetch(call.pred, call.pred_dtype, offset, n, pred);
          run.signs[k] =
              call.signs ? call.signs + 2 * prediction_row * call.shape.groups() + start / 4 : nullptr;
        }
        run.map = call.map ? static_cast<T*>(call.map) + row * call.shape.length + start : nullptr;
        forward_dispatch(call, run, mask.scan.binary, sum);
      });
    });
    if (call.partials != nullptr) {
      double* out = call.partials + 4 * index;
      for (int r = 0; r < 2; ++r) {
        out[2 * r] = sum[r];
        out[2 * r + 1] = weight[r];
      }
    }
  }
}

// Training on half types: their own kernels, without a detour through buffers.
template <typename F>
IK_INLINE bool with_half(Penalty penalty, Dtype first, Dtype second, F&& f) {
  if (penalty != Penalty::l1 || first != second) return false;
  if (first == Dtype::f16) return f(Half()), true;
  if (first == Dtype::bf16) return f(Bfloat16()), true;
  return false;
}

template <typename S, typename T>
void forward_units_as(const PixelCall& call, int64_t unit_begin, int64_t unit_end) {
  constexpr Dtype stored = kNative<S>;
  const bool in_place = call.pred_dtype == stored && call.target_dtype == stored;
  const bool pairs = in_place && call.predictions % 2 == 0 && !call.mask_per_prediction &&
                     call.signs != nullptr && call.map == nullptr;
  pairs ? forward_units_of<S, T, 2>(call, unit_begin, unit_end)
        : forward_units_of<S, T, 1>(call, unit_begin, unit_end);
}

template <typename T>
void forward_units(const PixelCall& call, int64_t unit_begin, int64_t unit_end) {
  if constexpr (std::is_same<T, float>::value) {
    if (call.map == nullptr && with_half(call.penalty, call.pred_dtype, call.target_dtype, [&](auto half) {
          forward_units_as<decltype(half), T>(call, unit_begin, unit_end);
        })) {
      return;
    }
  }
  forward_units_as<T, T>(call, unit_begin, unit_end);
}

// S: the type the gradients are stored in, or T for any.
template <typename S, typename T>
void backward_units_of(const PixelCall& call, int64_t unit_begin, int64_t unit_end) {
  constexpr Dtype stored = kNative<S>;
  const bool l1 = call.penalty == Penalty::l1;
  const bool in_place = call.grad_pred_dtype == stored && call.grad_target_dtype == stored &&
                        (l1 || (call.pred_dtype == stored && call.target_dtype == stored));
  alignas(64) T mask_buffer[kChunk], pred[kBlock], target[kBlock];
  alignas(64) S grad_pred[kBlock], grad_target[kBlock];
  const int64_t target_rows = call.shape.samples / call.predictions * call.shape.segments;
  for (int64_t index = unit_begin; index < unit_end; ++index) {
    const Unit unit = call.unit(index);
    for_each_run<false, 1>(call, unit, mask_buffer, [&](int64_t sample, int64_t row, const RunMask<T>& mask) {
      for_each_block(unit, in_place, [&](int64_t start, int64_t n) {
        const int64_t offset = row * call.shape.length + start;
        const int64_t target_offset = row % target_rows * call.shape.length + start;
        BackwardRun<S, T> run;
        run.pred = call.pred ? fetch(call.pred, call.pred_dtype, offset, n, pred) : nullptr;
        run.target = call.target ? fetch(call.target, call.target_dtype, target_offset, n, target) : nullptr;
        run.weight = mask.weight ? mask.weight + (start - unit.begin) : nullptr;
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
        run.stream = call.stream && in_place && aligned(run.grad_pred) && aligned(run.grad_target);
        backward_dispatch(call, run);
        store_output(call.grad_pred, call.grad_pred_dtype, offset, n, grad_pred);
        store_output(call.grad_target, call.grad_target_dtype, offset, n, grad_target);
      });
    });
  }
  end_stream(call.stream);
}

template <typename T>
void backward_units(const PixelCall& call, int64_t unit_begin, int64_t unit_end) {
  if constexpr (std::is_same<T, float>::value) {
    if (with_half(call.penalty, call.grad_pred_dtype, call.grad_target_dtype,
                  [&](auto half) { backward_units_of<decltype(half), T>(call, unit_begin, unit_end); })) {
      return;
    }
  }
  backward_units_of<T, T>(call, unit_begin, unit_end);
}

}  // namespace

template <typename T>
constexpr Kernels<PixelCall> kKernels = {forward_units<T>, backward_units<T>};
IK_DEFINE_PER_ISA(Kernels<PixelCall>, pixel_kernels, kKernels)

}  // namespace ik::IK_ISA
