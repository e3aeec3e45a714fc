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

// Calls f(Stored<S>()) for the dtype S of source and result; false where they differ or vectors of T do not
// hold it.
template <typename T, typename F>
bool with_run(const PartialConvCall& call, const F& f) {
  if (call.source.dtype != call.result.dtype || call.source.interleaved != call.result.interleaved)
    return false;
  return with_stored(call.source.dtype, [&](auto stored) {
    constexpr bool direct = kDirect<typename decltype(stored)::type, T>;
    if constexpr (direct) f(stored);
    return direct;
  });
}

template <typename T>
void mask_input_units(const PartialConvCall& call, int64_t begin, int64_t end) {
  const bool several = call.mask.data != nullptr, interleaved = call.source.interleaved;
  bool done = false;
  const bool mask_fits = call.mask.interleaved == interleaved &&
                         (call.mask.dtype == kNative<T> || call.mask.dtype == call.source.dtype);
  if (several ? mask_fits : call.single_mask.data != nullptr) {
    done = with_run<T>(call, [&](auto stored) {
      using S = typename decltype(stored)::type;
      if (several && call.mask.dtype == call.source.dtype) {
        interleaved ? mask_input_runs<true, S, S, T>(call, begin, end)
                    : mask_input_runs<false, S, S, T>(call, begin, end);
      } else {
        interleaved ? mask_input_runs<true, S, T, T>(call, begin, end)
                    : mask_input_runs<false, S, T, T>(call, begin, end);
      }
    });
  }
  if (done) return;
  all_interleaved(call) ? mask_input_blocks<true, T>(call, begin, end)
                        : mask_input_blocks<false, T>(call, begin, end);
}

// Runs of channels see one value of a plane.
bool planes_fit(const PartialConvCall& call) {
  return !call.source.interleaved || (call.ratio.planes == 1 && call.new_mask.planes == 1);
}

template <typename T>
void finish_units(const PartialConvCall& call, int64_t begin, int64_t end) {
  const bool done = planes_fit(call) && with_run<T>(call, [&](auto stored) {
                      using S = typename decltype(stored)::type;
                      call.source.interleaved ? finish_runs<true, S, T>(call, begin, end)
                                              : finish_runs<false, S, T>(call, begin, end);
                    });
  if (done) return;
  all_interleaved(call) ? finish_blocks<true, T>(call, begin, end)
                        : finish_blocks<false, T>(call, begin, end);
}

template <typename T>
void finish_backward_units(const PartialConvCall& call, int64_t begin, int64_t end) {
  const bool output_fits =
      call.output.data == nullptr ||
      (call.output.dtype == call.source.dtype && call.output.interleaved == call.source.interleaved);
  const bool done = output_fits && planes_fit(call) && with_run<T>(call, [&](auto stored) {
                      using S = typename decltype(stored)::type;
                      call.source.interleaved ? finish_backward_runs<true, S, T>(call, begin, end)
                                              : finish_backward_runs<false, S, T>(call, begin, end);
                    });
  if (done) return;
  all_interleaved(call) ? finish_backward_blocks<true, T>(call, begin, end)
                        : finish_backward_blocks<false, T>(call, begin, end);
}

}  // namespace

template <typename T>
constexpr PartialConvKernels kKernels = {mask_input_units<T>, finish_units<T>, finish_backward_units<T>};
IK_DEFINE_PER_ISA(PartialConvKernels, partial_conv_kernels, kKernels)

}  // namespace ik::IK_ISA
