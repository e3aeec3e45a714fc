// CPU kernels of partial convolution: what stands before and after a library convolution.
//
//   mask_input       input * mask, 0 under mask 0                       an element is read and written once
//   finish           act((raw * ratio + bias) * new_mask)               likewise
//   finish_backward  gradients by raw and by the bias                   likewise, and the output read
//
// Along runs where all tensors lie the same way, else by blocks that are transposed in registers.
#include "cpu/partial_conv.h"

#include "cpu/isa/partial_conv_blocks.h"
#include "cpu/isa/partial_conv_rows.h"

namespace ik::IK_ISA {
namespace {

// Calls runs(Stored<S>(), interleaved) for the dtype S of source and result if both have it and lie the same way,
// and vectors of T hold it; else blocks(pixel rows). `fits`: the other tensors allow runs.
template <typename T, typename Runs, typename Blocks>
void runs_or_blocks(const PartialConvCall& call, bool fits, const Runs& runs, const Blocks& blocks) {
  if (fits && call.source.dtype == call.result.dtype && call.source.interleaved == call.result.interleaved) {
    const bool done = with_stored(call.source.dtype, [&](auto stored) {
      constexpr bool direct = kDirect<typename decltype(stored)::type, T>;
      if constexpr (direct) {
        with_bool(call.source.interleaved, [&](auto interleaved) { runs(stored, interleaved); });
      }
      return direct;
    });
    if (done) return;
  }
  // Where vectors run along channels, nothing has to be transposed if all are interleaved.
  with_bool(call.source.interleaved && call.result.interleaved &&
                (call.output.data == nullptr || call.output.interleaved) &&
                (call.mask.data == nullptr || call.mask.interleaved),
            blocks);
}

template <typename T>
void mask_input_units(const PartialConvCall& call, int64_t begin, int64_t end) {
  const bool several = call.mask.data != nullptr, same_dtype = call.mask.dtype == call.source.dtype;
  const bool mask_fits =
      call.mask.interleaved == call.source.interleaved && (call.mask.dtype == kNative<T> || same_dtype);
  runs_or_blocks<T>(
      call, several ? mask_fits : call.single_mask.data != nullptr,
      [&](auto stored, auto interleaved) {
        using S = typename decltype(stored)::type;
        constexpr bool I = decltype(interleaved)::value;
        several&& same_dtype ? mask_input_runs<I, S, S, T>(call, begin, end)
                             : mask_input_runs<I, S, T, T>(call, begin, end);
      },
      [&](auto pixel_rows) { mask_input_blocks<decltype(pixel_rows)::value, T>(call, begin, end); });
}

// Runs of channels see one value of a plane.
bool planes_fit(const PartialConvCall& call) {
  return !call.source.interleaved || (call.ratio.planes == 1 && call.new_mask.planes == 1);
}

template <typename T>
void finish_units(const PartialConvCall& call, int64_t begin, int64_t end) {
  runs_or_blocks<T>(
      call, planes_fit(call),
      [&](auto stored, auto interleaved) {
        finish_runs<decltype(interleaved)::value, typename decltype(stored)::type, T>(call, begin, end);
      },
      [&](auto pixel_rows) { finish_blocks<decltype(pixel_rows)::value, T>(call, begin, end); });
}

template <typename T>
void finish_backward_units(const PartialConvCall& call, int64_t begin, int64_t end) {
  const bool output_fits =
      call.output.data == nullptr ||
      (call.output.dtype == call.source.dtype && call.output.interleaved == call.source.interleaved);
  runs_or_blocks<T>(
      call, output_fits && planes_fit(call),
      [&](auto stored, auto interleaved) {
        finish_backward_runs<decltype(interleaved)::value, typename decltype(stored)::type, T>(call, begin,
                                                                                               end);
      },
      [&](auto pixel_rows) { finish_backward_blocks<decltype(pixel_rows)::value, T>(call, begin, end); });
}

}  // namespace

template <typename T>
constexpr PartialConvKernels kKernels = {mask_input_units<T>, finish_units<T>, finish_backward_units<T>};
IK_DEFINE_PER_ISA(PartialConvKernels, partial_conv_kernels, kKernels)

}  // namespace ik::IK_ISA
