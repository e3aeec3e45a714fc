// CPU kernels of stacked_images: every image is read once and every part written once; backward the other way
// round.
#include "cpu/stacked_images.h"

#include "cpu/isa/masks.h"
#include "cpu/isa/scratch.h"

namespace ik::IK_ISA {
namespace {

constexpr int64_t kPixels = StackedCall::unit_pixels;
// Elements at a time: the buffers of two images, a mask and two outputs stay in the first-level cache.
constexpr int64_t kBlock = 1024;

// What one channel of one part is: its place in the stacked batch and its affine map.
template <typename T>
struct PartChannel {
  Part part;
  int64_t offset;  // of the run in the stacked batch
  T scale, shift;
};

// `n` elements of one sample, of one channel or of all channels interleaved.
template <typename T>
struct Run {
  int64_t n;
  int64_t offset;  // in pred and target
  const T* mask;   // null without
  const PartChannel<T>* part_channels;
  int64_t part_channel_count;
  const T* scales;  // of every element, where channels are interleaved; else null
  const T* shifts;
};

// dst = src with the channels of every pixel in reverse.
template <typename T>
void reverse_channels(const T* src, int64_t n, int64_t channels, T* dst) {
  for (int64_t i = 0; i < n; i += channels) {
    for (int64_t c = 0; c < channels; ++c) dst[i + c] = src[i + channels - 1 - c];
  }
}

template <typename T>
class Worker {
 public:
  explicit Worker(const StackedCall& call)
      : call_(call),
        step_(call.step()),
        block_(kBlock / step_ > 0 ? kBlock / step_ * step_ : step_),
        buffers_(8 * (block_ + 16)),
        part_channels_(call.out_channels * call.part_count),
        scales_(2 * (block_ + 16)),
        gradients_(call.out_channels * call.part_count),
        converted_(call.stacked_dtype == kNative<T> ? 0
                                                    : call.out_channels * call.part_count * (block_ + 16)) {
    if (step_ == 1) return;
    for (int64_t i = 0; i < block_; ++i) {
      scales_.get()[i] = static_cast<T>(call.scale[i % step_]);
      scales_.get()[block_ + 16 + i] = call.shift ? static_cast<T>(call.shift[i % step_]) : T(0);
    }
  }

  // Calls f(run) for the runs of a unit.
  template <typename F>
  void for_each_run(int64_t unit, F&& f) {
    const PixelShape& shape = call_.shape;
    const int64_t sample = unit / call_.chunks();
    const int64_t begin = unit % call_.chunks() * kPixels;
    const int64_t end = least(begin + kPixels, shape.pixels);
    const int64_t out_segments = shape.segments == shape.channels ? call_.out_channels : 1;
    for (int64_t segment = 0; segment < shape.segments; ++segment) {
      int64_t count = 0;
      for (int64_t out = 0; out < out_segments; ++out) {
        const int64_t from = out_segments == shape.segments ? (call_.swap ? out_segments - 1 - out : out) : 0;
        if (step_ == 1 && from != segment) continue;
        for (int64_t p = 0; p < call_.part_count; ++p) {
          PartChannel<T>& part_channel = part_channels_.get()[count++];
          part_channel.part = static_cast<Part>(call_.parts[p]);
          part_channel.offset = ((p * shape.samples + sample) * out_segments + out) * shape.length;
          part_channel.scale = static_cast<T>(call_.scale[out]);
          part_channel.shift = call_.shift ? static_cast<T>(call_.shift[out]) : T(0);
        }
      }
      for (int64_t at = begin * step_; at < end * step_; at += block_) {
        Run<T> run;
        run.n = least(block_, end * step_ - at);
        run.offset = (sample * shape.segments + segment) * shape.length + at;
        run.mask = call_.mask ? mask_of(sample, segment, at, run.n) : nullptr;
        run.part_channels = part_channels_.get();
        run.part_channel_count = count;
        run.scales = step_ > 1 ? scales_.get() : nullptr;
        run.shifts = scales_.get() + block_ + 16;
        f(run, at);
      }
    }
  }

  void forward(const Run<T>& run, int64_t at) {
    const T* pred = image(call_.pred, call_.pred_dtype, run, buffer(0));
    const T* target = image(call_.target, call_.target_dtype, run, buffer(1));
    const bool native = call_.stacked_dtype == kNative<T>;
    for (int64_t s = 0; s < run.part_channel_count; ++s) {
      const PartChannel<T>& part_channel = run.part_channels[s];
      const int64_t offset = part_channel.offset + at;
      T* out = output_at(call_.stacked, call_.stacked_dtype, offset, buffer(3));
      write(part_channel, run, pred, target, out, native && call_.stream && aligned(out));
      store_output(call_.stacked, call_.stacked_dtype, offset, run.n, out);
    }
  }

  void backward(const Run<T>& run, int64_t at) {
    T* to_pred = output(call_.grad_pred, call_.pred_dtype, run, buffer(3));
    T* to_target = output(call_.grad_target, call_.target_dtype, run, buffer(4));
    Gradient* gradients = gradients_.get();
    int64_t count = 0;
    for (int64_t s = 0; s < run.part_channel_count; ++s) {
      const PartChannel<T>& part_channel = run.part_channels[s];
      const bool of_pred = part_channel.part == Part::raw || part_channel.part == Part::hole_raw;
      if (part_channel.part != Part::composite && (of_pred ? to_pred : to_target) == nullptr) continue;
      T* converted = converted_.get() ? converted_.get() + count * (block_ + 16) : nullptr;
      gradients[count++] = {
          part_channel.part, part_channel.scale,
          fetch(call_.stacked, call_.stacked_dtype, part_channel.offset + at, run.n, converted)};
    }
    const bool stream = call_.stream && aligned(to_pred) && aligned(to_target) && to_pred != buffer(3) &&
                        to_target != buffer(4);
    const V one(T(1)), zero(T(0));
    for_each_vector<V>(run.n, [&](int64_t i, int n) __attribute__((always_inline)) {
      V hole(zero), valid(zero);
      if (run.mask != nullptr)
        split_regions(load_part<V>(run.mask + i, n), one, call_.mask_is_hole, hole, valid);
      V pred(zero), target(zero);
      for (int64_t s = 0; s < count; ++s) {
        const Gradient& from = gradients[s];
        prefetch(from.grad + i);
        const V g =
            load_part<V>(from.grad + i, n) * (run.scales ? load_part<V>(run.scales + i, n) : V(from.scale));
        if (from.part == Part::raw) {
          pred = pred + g;
        } else if (from.part == Part::target) {
          target = target + g;
        } else {
          const V in_hole = select_zero_(hole, hole * g);
          if (from.part == Part::hole_target) {
            target = target + in_hole;
          } else {
            pred = pred + in_hole;
          }
          if (from.part == Part::composite) target = target + select_zero_(valid, valid * g);
        }
      }
      if (to_pred) store_part(pred, to_pred + i, n, stream);
      if (to_target) store_part(target, to_target + i, n, stream);
    });
    finish(call_.grad_pred, call_.pred_dtype, run, to_pred);
    finish(call_.grad_target, call_.target_dtype, run, to_target);
  }

 private:
  using V = Vec<T>;

  T* buffer(int64_t i) { return buffers_.get() + i * (block_ + 16); }

  const T* image(const void* data, Dtype dtype, const Run<T>& run, T* out) {
    const T* values = fetch(data, dtype, run.offset, run.n, out);
    if (!reverses()) return values;
    reverse_channels(values, run.n, step_, buffer(5));
    std::memcpy(out, buffer(5), static_cast<size_t>(run.n) * sizeof(T));
    return out;
  }

  // The mask of every element of a run.
  const T* mask_of(int64_t sample, int64_t segment, int64_t at, int64_t n) {
    const PixelShape& shape = call_.shape;
    const int64_t repeat = shape.mask_repeat;
    const int64_t offset = sample * shape.mask_stride_n + segment * shape.mask_stride_c + at / repeat;
    const T* values = fetch(call_.mask, call_.mask_dtype, offset, n / repeat, buffer(6));
    if (repeat == 1 && !reverses()) return values;
    repeat > 1 ? repeat_each(values, n / repeat, repeat, buffer(7))
               : reverse_channels(values, n, step_, buffer(7));
    return buffer(7);
  }

  template <typename F>
  IK_MEMBER void write_values(const PartChannel<T>& part_channel, const Run<T>& run, T* out, bool stream,
                              F&& value) const {
    for_each_vector<V>(run.n, [&](int64_t i, int count) __attribute__((always_inline)) {
      const V scale = run.scales ? load_part<V>(run.scales + i, count) : V(part_channel.scale);
      const V shift = run.scales ? load_part<V>(run.shifts + i, count) : V(part_channel.shift);
      store_part(value(i, count) * scale + shift, out + i, count, stream);
    });
  }

  void write(const PartChannel<T>& part_channel, const Run<T>& run, const T* pred, const T* target, T* out,
             bool stream) const {
    const T* image = part_channel.part == Part::raw || part_channel.part == Part::hole_raw ? pred : target;
    if (part_channel.part == Part::raw || part_channel.part == Part::target) {
      return write_values(part_channel, run, out, stream,
                          [&](int64_t i, int count)
                              __attribute__((always_inline)) { return load_part<V>(image + i, count); });
    }
    with_bool(part_channel.part == Part::composite, [&](auto composite) {
      write_values(part_channel, run, out, stream, [&](int64_t i, int count) __attribute__((always_inline)) {
        V hole, valid;
        split_regions(load_part<V>(run.mask + i, count), V(T(1)), call_.mask_is_hole, hole, valid);
        if constexpr (!decltype(composite)::value) {
          return select_zero_(hole, hole * load_part<V>(image + i, count));
        } else {
          return select_zero_(hole, hole * load_part<V>(pred + i, count)) +
                 select_zero_(valid, valid * load_part<V>(target + i, count));
        }
      });
    });
  }

  // Where a gradient is written: in place, unless it has to be converted or reversed.
  T* output(void* data, Dtype dtype, const Run<T>& run, T* otherwise) const {
    return data != nullptr && reverses() ? otherwise : output_at(data, dtype, run.offset, otherwise);
  }
  void finish(void* data, Dtype dtype, const Run<T>& run, const T* from) {
    if (data == nullptr || !reverses()) return store_output(data, dtype, run.offset, run.n, from);
    reverse_channels(from, run.n, step_, buffer(5));
    convert_from(dtype, buffer(5), run.n, static_cast<char*>(data) + run.offset * dtype_bytes(dtype));
  }
  bool reverses() const { return step_ > 1 && call_.swap; }

  const StackedCall& call_;
  int64_t step_, block_;
  Scratch<T> buffers_;
  Scratch<PartChannel<T>> part_channels_;
  Scratch<T> scales_;
  // Of the gradients of one run, backward.
  struct Gradient {
    Part part;
    T scale;
    const T* grad;
  };
  Scratch<Gradient> gradients_;
  Scratch<T> converted_;
};

template <bool FORWARD, typename T>
void units(const StackedCall& call, int64_t unit_begin, int64_t unit_end) {
  Worker<T> worker(call);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
    worker.for_each_run(unit, [&](const Run<T>& run, int64_t at) {
      FORWARD ? worker.forward(run, at) : worker.backward(run, at);
    });
  }
  end_stream(call.stream);
}

}  // namespace

template <typename T>
constexpr Kernels<StackedCall> kKernels = {units<true, T>, units<false, T>};
IK_DEFINE_PER_ISA(Kernels<StackedCall>, stacked_kernels, kKernels)

}  // namespace ik::IK_ISA
