// CPU kernels of partial convolution's mask path: the mask summed over channels, then over windows.
#include <limits>

#include "cpu/isa/convert.h"
#include "cpu/partial_conv.h"
#include "cpu/isa/scratch.h"

namespace ik::IK_ISA {
namespace {

template <typename T>
IK_INLINE void set_zero(T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = T(0);
}

// sum[i] += element offset + i of data, i < n.
template <typename T>
void add_run(Dtype dtype, const void* data, int64_t offset, int64_t n, T* sum) {
  constexpr int64_t kSome = 256;
  T values[kSome];
  for (int64_t at = 0; at < n; at += kSome) {
    const int64_t count = least(kSome, n - at);
    const T* run = fetch(data, dtype, offset + at, count, values);
    for_each_vector<Vec<T>>(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      prefetch(run + i);
      store_part(load_part<Vec<T>>(sum + at + i, lanes) + load_part<Vec<T>>(run + i, lanes), sum + at + i,
                 lanes);
    });
  }
}

// Adds the channels of every group into its plane; unit: (sample, group, tile of pixels).
template <typename T>
void sum_channels_units(const WindowCall& call, int64_t begin, int64_t end) {
  const int64_t tiles = call.sum_units() / (call.samples * call.groups);
  const int64_t W = call.size[2];
  const int64_t* stride = call.mask_stride;
  T values[256];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / tiles, n = plane / call.groups, first = plane % call.groups * call.members;
    const int64_t from = unit % tiles * WindowCall::tile;
    const int64_t to = least(from + WindowCall::tile, call.pixels());
    T* out = static_cast<T*>(call.planes) + plane * call.pixels();
    set_zero(out + from, to - from);
    if (call.flat()) {
      for (int64_t c = first; c < first + call.members; ++c) {
        add_run(call.mask_dtype, call.mask, n * stride[0] + c * stride[1] + from, to - from, out + from);
      }
    } else {
      for (int64_t at = from; at < to; ++at) {
        const int64_t x = at % W, y = at / W % call.size[1], z = at / W / call.size[1];
        const int64_t pixel = n * stride[0] + z * stride[2] + y * stride[3] + x * stride[4];
        for (int64_t c = 0; c < call.members; c += 256) {
          const int64_t count = least(256, call.members - c);
          const T* run = fetch(call.mask, call.mask_dtype, pixel + first + c, count, values);
          T lanes[8] = {};
          int64_t i = 0;
          for (; i + 8 <= count; i += 8) {
            for (int64_t k = 0; k < 8; ++k) lanes[k] += run[i + k];
          }
          for (; i < count; ++i) lanes[0] += run[i];
          for (int k = 0; k < 8; ++k) out[at] += lanes[k];
        }
      }
    }
    for (int64_t at = from; at < to; ++at) out[at] *= static_cast<T>(call.multiplicity);
  }
}

// Box filter of the planes, ratio and new mask; row: (sample, group, depth, height) of the output.
template <typename T>
void sum_windows_rows(const WindowCall& call, int64_t begin, int64_t end) {
  const int64_t D = call.size[0], H = call.size[1], W = call.size[2], out_width = call.out_size[2];
  const int64_t pad = call.padding[2], step = call.stride[2];
  // The column sums of one row of windows, between the zeros of the padding.
  Scratch<T> column_buffer(W + 2 * pad), sum_buffer(out_width);
  T *columns = column_buffer.get(), *sums = sum_buffer.get();
  const double size = static_cast<double>(call.members * call.multiplicity) * call.kernel[0] *
                      call.kernel[1] * call.kernel[2];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t plane = row / (call.out_size[0] * call.out_size[1]);
    const int64_t oz = row / call.out_size[1] % call.out_size[0], oy = row % call.out_size[1];
    const T* in = static_cast<const T*>(call.planes) + plane * call.pixels();
    set_zero(columns, W + 2 * pad);
    for (int64_t kz = 0; kz < call.kernel[0]; ++kz) {
      const int64_t z = oz * call.stride[0] - call.padding[0] + kz * call.dilation[0];
      if (z < 0 || z >= D) continue;
      for (int64_t ky = 0; ky < call.kernel[1]; ++ky) {
        const int64_t y = oy * call.stride[1] - call.padding[1] + ky * call.dilation[1];
        if (y < 0 || y >= H) continue;
        const T* line = in + (z * H + y) * W;
        for (int64_t x = 0; x < W; ++x) columns[pad + x] += line[x];
      }
    }
    set_zero(sums, out_width);
    for (int64_t kx = 0; kx < call.kernel[2]; ++kx) {
      const T* from = columns + kx * call.dilation[2];
      if (step == 1) {
        for (int64_t x = 0; x < out_width; ++x) sums[x] += from[x];
      } else {
        for (int64_t x = 0; x < out_width; ++x) sums[x] += from[x * step];
      }
    }
    T* ratio = static_cast<T*>(call.ratio) + row * out_width;
    T* new_mask = static_cast<T*>(call.new_mask) + row * out_width;
    for (int64_t x = 0; x < out_width; ++x) {
      const T s = sums[x];
      ratio[x] = window_ratio(s, static_cast<T>(call.numerator), std::numeric_limits<T>::max(), call.update);
      new_mask[x] = window_mask(s, static_cast<T>(size), call.update);
    }
  }
}

}  // namespace

template <typename T>
constexpr WindowKernels kKernels = {sum_channels_units<T>, sum_windows_rows<T>};
IK_DEFINE_PER_ISA(WindowKernels, window_kernels, kKernels)

}  // namespace ik::IK_ISA
