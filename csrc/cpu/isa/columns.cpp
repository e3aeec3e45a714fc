// CPU kernels of channel columns (lpips): unit vectors of every pixel's channels, their weighted squared difference.
//
// Forward reads both maps once, for sums out of which everything follows. Backward is one elementwise sweep with four coefficients a pixel. NCHW: vectors over the pixels;
// channels_last: vectors over the channels of one pixel. Types that are not computed in are converted run by run.
#include "cpu/isa/columns_backward.h"
#include "cpu/isa/columns_forward.h"

namespace ik::IK_ISA {
namespace {

template <template <typename> class Direction, typename T>
void units(const ColumnsCall& call, int64_t unit_begin, int64_t unit_end) {
  Direction<T> worker(call);
  for (int64_t unit = unit_begin; unit < unit_end; ++unit) worker.unit(unit);
  end_stream(call.stream);
}

}  // namespace

template <typename T>
constexpr Kernels<ColumnsCall> kKernels = {units<Forward, T>, units<Backward, T>};
IK_DEFINE_PER_ISA(Kernels<ColumnsCall>, columns_kernels, kKernels)

}  // namespace ik::IK_ISA
