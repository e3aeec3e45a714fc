// Tensor arguments of the CUDA ops on the host: dtype dispatch, alignment, checks.
#pragma once

#include "common/op_args.h"
#include "cuda/cuda_utils.cuh"
#include "cuda/vector.cuh"

namespace ik::cuda {

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>()).
template <typename Body>
void with_dtype(const char* argument, ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(Type<float>());
    case ScalarType::Half:
      return body(Type<Half>());
    case ScalarType::BFloat16:
      return body(Type<BFloat16>());
    default:
      STD_TORCH_CHECK(false, argument, ": the cuda backend takes float16, bfloat16 and float32");
  }
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes < 16 ? bytes : 16) == 0;
}

inline const float* float_data(const Tensor& tensor, const char* argument) {
  STD_TORCH_CHECK(on_device(tensor) && tensor.scalar_type() == ScalarType::Float, argument,
                  " must be a float32 tensor on the GPU");
  return static_cast<const float*>(tensor.const_data_ptr());
}

}  // namespace ik::cuda
