// What the parts of a stacked batch are, shared by CPU and CUDA kernels.
#pragma once

namespace ik {

// In the order of reference/stacked_images.py.
enum class Part : int { raw, composite, target, hole_raw, hole_target };

}  // namespace ik
