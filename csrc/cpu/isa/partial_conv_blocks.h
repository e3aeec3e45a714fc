// Partial convolution on blocks of L channels by L pixels (L: lanes of a vector), for tensors that do not all
// lie the same way. A block is held with a vector for each channel, or for each pixel; what lies the other
// way in memory is transposed on the way in or out, so that a change of layout or dtype costs no extra pass.
#pragma once

#include "cpu/isa/convert.h"
#include "cpu/partial_conv.h"
#include "cpu/isa/scratch.h"
#include "cpu/isa/transpose.h"

namespace ik::IK_ISA {
namespace {

// The channels and pixels of one block.
struct Block {
  int64_t n;
  int64_t channel;
  int channels;
  int64_t pixel;
  int pixels;
};

// Whether vectors run along pixels or along channels, and how many are used of what.
template <bool PIXEL_ROWS>
struct Shape {
  int rows;
  int lanes;
  explicit IK_MEMBER Shape(const Block& b)
      : rows(PIXEL_ROWS ? b.pixels : b.channels), lanes(PIXEL_ROWS ? b.channels : b.pixels) {}
};

IK_INLINE int64_t offset_of(const ImageView& view, const Block& b) {
  return b.n * view.stride_n + b.channel * view.stride_c + b.pixel * view.stride_s;
}

template <bool PIXEL_ROWS, typename S, typename T>
IK_NOINLINE void load_typed(const ImageView& view, const Block& b, Vec<T>* rows) {
  const S* p = static_cast<const S*>(view.data) + offset_of(view, b);
  const Shape<PIXEL_ROWS> shape(b);
  const int64_t step = view.interleaved ? view.stride_s : view.stride_c;
  if (view.interleaved == PIXEL_ROWS) {
    for (int r = 0; r < shape.rows; ++r) {
      prefetch(p + r * step);
      rows[r] = load_part<Vec<T>>(p + r * step, shape.lanes);
    }
    return;
  }
  for (int r = 0; r < shape.lanes; ++r) {
    prefetch(p + r * step);
    rows[r] = load_part<Vec<T>>(p + r * step, shape.rows);
  }
  for (int r = shape.lanes; r < Vec<T>::lanes; ++r) rows[r] = Vec<T>(T(0));
  transpose(rows);
}

template <bool PIXEL_ROWS, typename T>
void load_block(const ImageView& view, const Block& b, Vec<T>* rows) {
  with_stored(view.dtype,
              [&](auto stored) { load_typed<PIXEL_ROWS, typename decltype(stored)::type>(view, b, rows); });
}

template <bool PIXEL_ROWS, typename S, typename T>
IK_NOINLINE void store_typed(const ImageView& view, const Block& b, Vec<T>* rows) {
  S* p = static_cast<S*>(view.data) + offset_of(view, b);
  const Shape<PIXEL_ROWS> shape(b);
  const int64_t step = view.interleaved ? view.stride_s : view.stride_c;
  if (view.interleaved == PIXEL_ROWS) {
    for (int r = 0; r < shape.rows; ++r) store_part(rows[r], p + r * step, shape.lanes);
    return;
  }
  transpose(rows);
  for (int r = 0; r < shape.lanes; ++r) store_part(rows[r], p + r * step, shape.rows);
}

// Leaves `rows` in any order.
template <bool PIXEL_ROWS, typename T>
void store_block(const ImageView& view, const Block& b, Vec<T>* rows) {
  with_stored(view.dtype, [&](auto stored) {
    using S = typename decltype(stored)::type;
    if constexpr (sizeof(S) > 1) store_typed<PIXEL_ROWS, S>(view, b, rows);
  });
}

// A plane's values for the rows of a block.
template <bool PIXEL_ROWS, typename T>
IK_NOINLINE void load_plane(const PlaneView& view, const PartialConvCall& call, const Block& b,
                            Vec<T>* rows) {
  const T* p = static_cast<const T*>(view.data) + b.n * view.stride_n + b.pixel;
  const Shape<PIXEL_ROWS> shape(b);
  // The plane of a channel of the block.
  const auto plane = [&](int i) {
    return view.planes == 1 ? p : p + (b.channel + i) / (call.channels / view.planes) * call.pixels;
  };
  for (int r = 0; r < shape.rows; ++r) {
    if (!PIXEL_ROWS) {
      rows[r] = load_part<Vec<T>>(plane(r), shape.lanes);
    } else if (view.planes == 1) {
      rows[r] = Vec<T>(p[r]);
    } else {
      T some[Vec<T>::lanes] = {};
      for (int i = 0; i < shape.lanes; ++i) some[i] = plane(i)[r];
      rows[r] = Vec<T>::load(some);
    }
  }
}

template <bool PIXEL_ROWS, typename T>
IK_INLINE Vec<T> row_bias(const Vec<T>& lanes, const T* bias, int r) {
  return PIXEL_ROWS ? lanes : Vec<T>(bias[r]);
}

// Calls f(unit, block) for every block of the units.
template <typename T, typename F>
IK_INLINE void for_blocks(const PartialConvCall& call, int64_t begin, int64_t end, const F& f) {
  constexpr int L = Vec<T>::lanes;
  // Rows of NCHW are far apart: a few cache lines of each at a time, then the next channels.
  constexpr int64_t kPixels = 8 * L;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % call.tiles() * PartialConvCall::tile;
    const int64_t last = least(first + PartialConvCall::tile, call.pixels);
    Block b;
    b.n = unit / call.tiles();
    for (int64_t some = first; some < last; some += kPixels) {
      for (b.channel = 0; b.channel < call.channels; b.channel += L) {
        b.channels = static_cast<int>(least(L, call.channels - b.channel));
        const int64_t stop = least(some + kPixels, last);
        for (b.pixel = some; b.pixel < stop; b.pixel += L) {
          b.pixels = static_cast<int>(least(L, stop - b.pixel));
          f(unit, b);
        }
      }
    }
  }
}

template <bool PIXEL_ROWS, typename T>
void mask_input_blocks(const PartialConvCall& call, int64_t begin, int64_t end) {
  constexpr int L = Vec<T>::lanes;
  for_blocks<T>(call, begin, end, [&](int64_t, const Block& b) {
    Vec<T> rows[L], mask[L];
    load_block<PIXEL_ROWS>(call.source, b, rows);
    if (call.mask.data != nullptr) {
      load_block<PIXEL_ROWS>(call.mask, b, mask);
    } else if (call.single_mask.data != nullptr) {
      load_plane<PIXEL_ROWS>(call.single_mask, call, b, mask);
    }
    if (call.mask.data != nullptr || call.single_mask.data != nullptr) {
      const Shape<PIXEL_ROWS> shape(b);
      for (int r = 0; r < shape.rows; ++r) rows[r] = select_zero_(mask[r], rows[r] * mask[r]);
    }
    store_block<PIXEL_ROWS>(call.result, b, rows);
  });
}

template <bool PIXEL_ROWS, typename T>
void finish_blocks(const PartialConvCall& call, int64_t begin, int64_t end) {
  constexpr int L = Vec<T>::lanes;
  const Finish how = call.how;
  const Vec<T> slope(static_cast<T>(call.slope));
  for_blocks<T>(call, begin, end, [&](int64_t, const Block& b) {
    Vec<T> rows[L], ratio[L], new_mask[L];
    load_block<PIXEL_ROWS>(call.source, b, rows);
    load_plane<PIXEL_ROWS>(call.ratio, call, b, ratio);
    load_plane<PIXEL_ROWS>(call.new_mask, call, b, new_mask);
    T bias[L] = {};
    for (int i = 0; i < b.channels; ++i) bias[i] = static_cast<const T*>(call.bias)[b.channel + i];
    const Vec<T> lanes = Vec<T>::load(bias);
    const Shape<PIXEL_ROWS> shape(b);
    for (int r = 0; r < shape.rows; ++r) {
      rows[r] = finish(rows[r], ratio[r], new_mask[r], row_bias<PIXEL_ROWS, T>(lanes, bias, r), slope, how);
    }
    store_block<PIXEL_ROWS>(call.result, b, rows);
  });
}

template <bool PIXEL_ROWS, typename T>
void finish_backward_blocks(const PartialConvCall& call, int64_t begin, int64_t end) {
  constexpr int L = Vec<T>::lanes;
  const Finish how = call.how;
  const Vec<T> slope(static_cast<T>(call.slope));
  for_blocks<T>(call, begin, end, [&](int64_t unit, const Block& b) {
    Vec<T> rows[L], out[L], ratio[L], new_mask[L];
    load_block<PIXEL_ROWS>(call.source, b, rows);
    if (call.output.data != nullptr) load_block<PIXEL_ROWS>(call.output, b, out);
    load_plane<PIXEL_ROWS>(call.ratio, call, b, ratio);
    load_plane<PIXEL_ROWS>(call.new_mask, call, b, new_mask);
    T* sums = static_cast<T*>(call.bias_sums) + unit * call.channels + b.channel;
    const Shape<PIXEL_ROWS> shape(b);
    Vec<T> total(T(0));
    for (int r = 0; r < shape.rows; ++r) {
      const Vec<T> output = call.output.data != nullptr ? out[r] : Vec<T>(T(0));
      const Vec<T> grad = finish_bias_grad(rows[r], output, ratio[r], new_mask[r], slope, how);
      if (PIXEL_ROWS) {
        total = total + grad;
      } else {
        sums[r] += grad.lane_sum();
      }
      rows[r] = finish_raw_grad(grad, ratio[r], how);
    }
    if (PIXEL_ROWS) {
      T some[L];
      total.store(some);
      for (int i = 0; i < shape.lanes; ++i) sums[i] += some[i];
    }
    store_block<PIXEL_ROWS>(call.result, b, rows);
  });
}

}  // namespace
}  // namespace ik::IK_ISA
