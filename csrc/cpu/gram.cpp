// gram. The kernels are in isa/gram.cpp.
#include "cpu/gram_op.h"

namespace ik {
namespace {

template <typename T>
void write_gram(const FeatureMap& map, double scale, Tensor& out) {
  GramSums<T> sums(map);
  const int64_t C = map.channels;
  auto write = [&](const auto* gram) {
    write_symmetric(map.samples, C, static_cast<T*>(out.mutable_data_ptr()),
                    [&](int64_t n, int64_t i, T* row) {
                      for (int64_t j = 0; j <= i; ++j)
                        row[j] = static_cast<T>(gram[(n * C + i) * C + j] * scale);
                    });
  };
  sums.whole() ? write(sums.partials.get()) : write(sums.wide());
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
  const auto factor = padded_factor<T>(x.map.samples, C, [&](int64_t n, int64_t i, T* row) {
    const T* matrix = g + n * C * C;
    for (int64_t j = 0; j < C; ++j) row[j] = static_cast<T>((matrix[i * C + j] + matrix[j * C + i]) * scale);
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
