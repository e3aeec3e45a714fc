// torch's dtypes as the kernels know them.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/convert.h"

namespace ik {

static inline Dtype dtype_code(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Bool:
      return Dtype::boolean;
    default:
      STD_TORCH_CHECK(type == ScalarType::Byte, "dtype of a tensor: floating, bool or uint8 expected");
      return Dtype::u8;
  }
}

}  // namespace ik
