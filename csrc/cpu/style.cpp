// style. The kernels are in isa/gram.cpp.
#include "cpu/gram_op.h"

namespace ik {
namespace {

// Scaled Gram matrices of a layer's target, lower triangle in double: [N, C, C].
template <typename T>
std::unique_ptr<double[]> target_grams(const Tensor& target, bool is_gram, GramNormalize normalize) {
  if (is_gram) {
    const Tensor ready = torch::stable::contiguous(target);
    std::unique_ptr<double[]> grams(new double[static_cast<size_t>(ready.numel())]);
    generic::convert_to(dtype_code(ready.scalar_type()), ready.const_data_ptr(), ready.numel(), grams.get());
    return grams;
  }
  const Features y(target);
  auto grams = gram_sums<T>(y.map);
  const int64_t C = y.map.channels;
  const double scale = gram_scale(normalize, static_cast<double>(C), static_cast<double>(y.map.pixels));
  for (int64_t row = 0; row < y.map.samples * C; ++row) {
    for (int64_t j = 0; j <= row % C; ++j) grams[row * C + j] *= scale;
  }
  return grams;
}

// Loss of one layer; fills `factor` [k N, C, C] if it is wanted.
template <typename T>
double style_layer(const Tensor& input, const Tensor& target, bool is_gram, bool l1, GramNormalize normalize,
                   double weight, T* factor) {
  const Features x(input);
  const int64_t C = x.map.channels;
  const int64_t batch = target.sizes()[0];
  const double pixels = static_cast<double>(x.map.pixels);
  const double scale = gram_scale(normalize, static_cast<double>(C), pixels);
  const double coefficient = weight * style_coefficient(normalize, static_cast<double>(C), pixels,
                                                        static_cast<double>(x.map.samples));
  const auto grams = gram_sums<T>(x.map);
  const auto goals = target_grams<T>(target, is_gram, normalize);
  std::vector<double> losses(static_cast<size_t>(x.map.samples));
  torch::stable::parallel_for(0, x.map.samples, grain_of(C * C), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const double* gram = grams.get() + n * C * C;
      const double* goal = goals.get() + n % batch * C * C;
      double loss = 0;
      for (int64_t i = 0; i < C; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          const double d = gram[i * C + j] * scale - goal[i * C + j];
          double mirrored = d;
          if (is_gram) mirrored = gram[i * C + j] * scale - goal[j * C + i];
          loss += style_entry(l1, d, mirrored, i == j);
          if (factor != nullptr) {
            const double slope = style_entry_grad(l1, d, mirrored);
            const T value = static_cast<T>(2 * scale * coefficient * slope);
            factor[(n * C + i) * C + j] = value;
            factor[(n * C + j) * C + i] = value;
          }
        }
      }
      losses[n] = loss;
    }
  });
  double loss = 0;
  for (const double value : losses) loss += value;
  return loss * coefficient;
}

std::tuple<Tensor, std::vector<Tensor>> style(
    const std::vector<Tensor>& input,   // [k N, C, H, W] each
    const std::vector<Tensor>& target,  // [N, C, H', W'] or [N, C, C]
    const std::vector<double>& weights, const std::string& penalty, const std::string& normalize,
    bool target_is_gram, bool save) {
  STD_TORCH_CHECK(input.size() == target.size() && input.size() == weights.size() && !input.empty(),
                  "style: input, target and weights must have one entry for each layer");
  const bool l1 = penalty == "l1";
  const GramNormalize norm = parse_gram_normalize(normalize);
  const ScalarType dtype = accumulate_type(input, target);
  const bool wide = dtype == ScalarType::Double;
  std::vector<Tensor> factors;
  double loss = 0;
  for (size_t i = 0; i < input.size(); ++i) {
    const int64_t N = input[i].sizes()[0];
    const int64_t C = input[i].sizes()[1];
    factors.push_back(save ? empty_strided(input[i], {N, C, C}, {C * C, C, 1}, dtype)
                           : empty_1d(input[i], 0, dtype));
    void* factor = save ? factors.back().mutable_data_ptr() : nullptr;
    loss += wide ? style_layer<double>(input[i], target[i], target_is_gram, l1, norm, weights[i],
                                       static_cast<double*>(factor))
                 : style_layer<float>(input[i], target[i], target_is_gram, l1, norm, weights[i],
                                      static_cast<float*>(factor));
  }
  return {make_scalar(input[0], loss, dtype), factors};
}

// sign * grad * (factors summed over the k predictions) * features.
template <typename T>
Tensor differentiate_layer(const Tensor& factors, const Tensor& features, double coefficient) {
  const Features x(features);
  const T* f = static_cast<const T*>(factors.const_data_ptr());
  const int64_t C = x.map.channels;
  const int64_t N = x.map.samples;
  const int64_t predictions = factors.sizes()[0];
  const auto padded = padded_factor<T>(N, C, [&](int64_t n, int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t p = n; p < predictions; p += N) sum += static_cast<double>(f[(p * C + i) * C + j]);
    return static_cast<T>(sum * coefficient);
  });
  return symmetric_product<T>(x, padded.get());
}

std::vector<Tensor> style_backward(const Tensor& grad,                   // []
                                   const std::vector<Tensor>& factors,   // [k N, C, C] each
                                   const std::vector<Tensor>& features,  // [N, C, H, W] each
                                   double sign) {
  const double coefficient = sign * scalar_value(grad);
  std::vector<Tensor> out;
  for (size_t i = 0; i < features.size(); ++i) {
    const Tensor factor = torch::stable::contiguous(factors[i]);
    out.push_back(factor.scalar_type() == ScalarType::Double
                      ? differentiate_layer<double>(factor, features[i], coefficient)
                      : differentiate_layer<float>(factor, features[i], coefficient));
  }
  return out;
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("style_cpu", TORCH_BOX(&ik::style));
  m.impl("style_backward_cpu", TORCH_BOX(&ik::style_backward));
}
