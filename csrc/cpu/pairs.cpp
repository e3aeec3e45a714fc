// CPU kernels over neighbouring pixels (total_variation, inpainting_pixel).
//
// One pass over the rows: the composite of a row is formed in the first-level cache, where the row above it
// still lies, so that hole, valid and total variation cost one read of the images. Backward: from the packed
// signs, without the images for l1. Bytes an element, float32 and l1 with a mask of zeros and ones:
// forward 8.75 + mask, backward 4.75 + a bit of the mask.
#include "cpu/pairs.h"

#include "cpu/pairs_backward.h"
#include "cpu/pairs_forward.h"

namespace ik {
namespace IK_ISA {

const PairKernels pair_kernels = {forward_units<float>, backward_units<float>};
#if defined(IK_ISA_GENERIC)
// float64 is for checking, not for speed: one build of it is enough.
const PairKernels pair_kernels_wide = {forward_units<double>, backward_units<double>};
#endif

}  // namespace IK_ISA
}  // namespace ik
