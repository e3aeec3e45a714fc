// Scalars in and out of 0-dimensional CPU tensors.
#pragma once

#include "common/op_args.h"
#include "cpu/torch_dtype.h"

namespace ik {

static inline void write_scalar(double value, bool wide, Tensor& out) {
  if (wide) {
    *static_cast<double*>(out.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
  }
}

static inline double scalar_value(const Tensor& t) {
  double value;
  generic::convert_to<double>(dtype_code(t.scalar_type()), t.const_data_ptr(), 1, &value);
  return value;
}

}  // namespace ik
