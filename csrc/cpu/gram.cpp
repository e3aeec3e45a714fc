// gram. The kernels are in isa/gram.cpp.
#include "cpu/gram_op.h"

namespace ik {
namespace {

template <typename T>
void write_gram(const FeatureMap& map, double scale, Tensor& out) {
  const auto sums = gram_sums<T>(map);
  T* gram = static_cast<T*>(out.mutable_data_ptr());
  const int64_t C = map.channels;
  torch::stable::parallel_for(0, map.samples, grain_of(C * C), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t i = 0; i < C; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          const T value = static_cast<T>(sums[(n * C + i) * C + j] * scale);
          gram[(n * C + i) * C + j] = value;
          gram[(n * C + j) * C + i] = value;
        }
      }
    }
  });
}

Tensor gram(const Tensor& features,  // [N, C, H, W]
            const std::string& normalize) {
  const Features x(features);
  const ScalarType dtype = accumulate_type(features.scalar_type(), features.scalar_type());
  const int64_t C = x.map.channels;
  Tensor out = empty_strided(features, {x.map.samples, C, C}, {C * C, C, 1}, dtype);
  const double scale =
      gram_scale(parse_gram_normalize(normalize), static_cast<double>(C), static_cast<double>(x.map.pixels));
  dtype == ScalarType::Double ? write_gram<double>(x.map, scale, out) : write_gram<float>(x.map, scale, out);
  return out;
}

template <typename T>
Tensor differentiate_gram(const Features& x, const Tensor& grad, double scale) {
  const T* g = static_cast<const T*>(grad.const_data_ptr());
  const int64_t C = x.map.channels;
  const auto factor = padded_factor<T>(x.map.samples, C, [&](int64_t n, int64_t i, int64_t j) {
    return static_cast<T>((g[(n * C + i) * C + j] + g[(n * C + j) * C + i]) * scale);
  });
  return symmetric_product<T>(x, factor.get());
}

Tensor gram_backward(const Tensor& grad,      // [N, C, C]
                     const Tensor& features,  // [N, C, H, W]
                     const std::string& normalize) {
  const Features x(features);
  const Tensor ready = torch::stable::contiguous(grad);
  const double scale = gram_scale(parse_gram_normalize(normalize), static_cast<double>(x.map.channels),
                                  static_cast<double>(x.map.pixels));
  return grad.scalar_type() == ScalarType::Double ? differentiate_gram<double>(x, ready, scale)
                                                  : differentiate_gram<float>(x, ready, scale);
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("gram_cpu", TORCH_BOX(&ik::gram));
  m.impl("gram_backward_cpu", TORCH_BOX(&ik::gram_backward));
}
