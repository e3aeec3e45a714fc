// Stands in for csrc/cuda/cuda_utils.cuh: the CUDA ops on CPU tensors, their kernels run by simt.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/simt.h"

namespace ik::cuda {

struct DeviceScope {
  explicit DeviceScope(const torch::stable::Tensor&) {}
};

inline bool on_device(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, const DeviceScope&,
            const Arguments&... arguments) {
  simt::launch(blocks, threads, [&] { kernel(arguments...); });
}

}  // namespace ik::cuda

// The registrations at the end of the op files: kernels of CPU tensors.
#define CUDA CPU
