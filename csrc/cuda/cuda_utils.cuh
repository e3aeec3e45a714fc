// Host side of a CUDA op on the LibTorch stable ABI: device, stream, checked launch. The tests replace this
// one file to run the kernels on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace ik::cuda {

// Makes the tensor's device current for its lifetime and knows the stream PyTorch uses there.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline bool on_device(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, const DeviceScope& device,
            const Arguments&... arguments) {
  kernel<<<blocks, threads, 0, device.stream()>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace ik::cuda
