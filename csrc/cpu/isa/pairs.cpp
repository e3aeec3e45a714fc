// CPU kernels over neighbouring pixels (total_variation, inpainting_pixel).
//
// One pass over the rows: the composite of a row is formed in the first-level cache, where the row above it
// still lies, so that hole, valid and total variation cost one read of the images. Backward: from the packed
// signs, without the images for l1. Bytes an element, float32 and l1 with a mask of zeros and ones:
// forward 8.75 + mask, backward 4.75 + a bit of the mask.
#include "cpu/pairs.h"

#include "cpu/isa/pairs_backward.h"
#include "cpu/isa/pairs_forward.h"

namespace ik::IK_ISA {

template <typename T>
constexpr Kernels<PairCall> kKernels = {forward_units<T>, backward_units<T>};
IK_DEFINE_PER_ISA(Kernels<PairCall>, pair_kernels, kKernels)

}  // namespace ik::IK_ISA
