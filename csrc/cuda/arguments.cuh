// Tensor arguments of the CUDA ops on the host: dtype dispatch, alignment, checks, grids.
#pragma once

#include <limits>

#include "common/op_args.h"
#include "cuda/cuda_utils.cuh"
#include "cuda/pixel.cuh"

namespace ik::cuda {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

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

inline ElementType mask_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return ElementType::f32;
    case ScalarType::Half:
      return ElementType::f16;
    case ScalarType::BFloat16:
      return ElementType::bf16;
    case ScalarType::Double:
      return ElementType::f64;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return ElementType::u8;
    default:
      STD_TORCH_CHECK(false, "mask: dtype must be floating, bool or uint8");
  }
}

inline ElementType image_type(const char* argument, ScalarType dtype) {
  with_dtype(argument, dtype, [](auto) {});
  return mask_type(dtype);
}

// The largest value of an 8-bit mask: 1 for bool, as a bool tensor viewed from other bytes is true for all
// but 0.
inline float mask_cap(const Tensor& mask) { return mask.scalar_type() == ScalarType::Bool ? 1.0f : 255.0f; }

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes < 16 ? bytes : 16) == 0;
}

inline const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

inline const float* float_data(const Tensor& tensor, const char* argument) {
  STD_TORCH_CHECK(on_device(tensor) && tensor.scalar_type() == ScalarType::Float, argument,
                  " must be a float32 tensor on the GPU");
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline float* float_output(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

inline unsigned grid_size(int64_t blocks, const char* argument) {
  STD_TORCH_CHECK(blocks <= kMost, argument, ": too many elements for one launch");
  return static_cast<unsigned>(blocks);
}

// Calls run(indices) once for each launch of the jobs in `waiting`: of jobs that agree(first, other), at most
// `most` in one.
template <typename Agree, typename Run>
void for_launches(std::vector<size_t> waiting, size_t most, const Agree& agree, const Run& run) {
  while (!waiting.empty()) {
    std::vector<size_t> chosen;
    std::vector<size_t> later;
    for (const size_t job : waiting) {
      (chosen.size() < most && agree(waiting.front(), job) ? chosen : later).push_back(job);
    }
    run(chosen);
    waiting.swap(later);
  }
}

}  // namespace ik::cuda
