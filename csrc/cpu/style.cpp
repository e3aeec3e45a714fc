// style. The kernels are in isa/gram.cpp.
#include "cpu/gram_op.h"

namespace ik {
namespace {

// Given Gram matrices in double.
std::unique_ptr<double[]> given_grams(const Tensor& target) {
  const Tensor ready = torch::stable::contiguous(target);
  std::unique_ptr<double[]> grams(new double[static_cast<size_t>(ready.numel())]);
  generic::convert_to(dtype_code(ready.scalar_type()), ready.const_data_ptr(), ready.numel(), grams.get());
  return grams;
}

// One row of G - G', `count` entries below the diagonal and the one on it: returns the penalties of the row
// and of its mirror image, writes `factor` times the slopes. Four sums, which compilers turn into vectors.
template <typename T, typename Gram>
double style_row(bool l1, const Gram* gram, double scale, const Gram* target_gram, double target_scale,
                 int64_t count, double factor, T* row) {
  double sums[4] = {0, 0, 0, 0};
  auto entry = [&](int64_t j) {
    const double d = gram[j] * scale - target_gram[j] * target_scale;
    row[j] = static_cast<T>(factor * style_penalty_grad(l1, d));
    return style_penalty(l1, d);
  };
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    for (int lane = 0; lane < 4; ++lane) sums[lane] += entry(j + lane);
  }
  for (; j < count; ++j) sums[0] += entry(j);
  return 2 * ((sums[0] + sums[1]) + (sums[2] + sums[3])) + entry(count);
}

// The same against a given matrix, which may be unsymmetric.
template <typename T>
double given_row(bool l1, const double* gram, double scale, const double* target_gram, int64_t C, int64_t i,
                 double factor, T* row) {
  double sum = 0;
  for (int64_t j = 0; j <= i; ++j) {
    const double d = gram[j] * scale - target_gram[i * C + j];
    const double mirrored = gram[j] * scale - target_gram[j * C + i];
    row[j] = static_cast<T>(factor * style_entry_grad(l1, d, mirrored));
    sum += style_entry(l1, d, mirrored, i == j);
  }
  return sum;
}

// Loss of one layer; fills `factor` [k N, C, C] if it is wanted.
template <typename T>
double style_layer(const Tensor& input, const Tensor& target, bool is_gram, bool l1, GramNormalize normalize,
                   double weight, T* factor) {
  const Features x(input);
  const int64_t C = x.map.channels;
  const int64_t N = x.map.samples;
  const int64_t batch = target.sizes()[0];
  const double pixels = static_cast<double>(x.map.pixels);
  const double scale = gram_scale(normalize, static_cast<double>(C), pixels);
  const double coefficient =
      weight * style_coefficient(normalize, static_cast<double>(C), pixels, static_cast<double>(N));
  const double slope = 2 * scale * coefficient;
  std::vector<double> losses(static_cast<size_t>(N * C));
  GramSums<T> grams(x.map);
  if (is_gram) {
    const auto given = given_grams(target);
    const double* gram = grams.wide();
    write_symmetric(N, C, factor, [&](int64_t n, int64_t i, T* row) {
      const double* target_gram = given.get() + n % batch * C * C;
      losses[n * C + i] = given_row(l1, gram + (n * C + i) * C, scale, target_gram, C, i, slope, row);
    });
  } else {
    const Features y(target);
    GramSums<T> target_grams(y.map);
    const double target_scale =
        gram_scale(normalize, static_cast<double>(C), static_cast<double>(y.map.pixels));
    auto compare = [&](const auto* gram, const auto* target_gram) {
      write_symmetric(N, C, factor, [&](int64_t n, int64_t i, T* row) {
        losses[n * C + i] = style_row(l1, gram + (n * C + i) * C, scale,
                                      target_gram + (n % batch * C + i) * C, target_scale, i, slope, row);
      });
    };
    if (grams.whole() && target_grams.whole()) {
      compare(grams.partials.get(), target_grams.partials.get());
    } else {
      compare(grams.wide(), target_grams.wide());
    }
  }
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
  const auto padded = padded_factor<T>(N, C, [&](int64_t n, int64_t i, T* row) {
    constexpr int64_t run = 64;
    double sums[run];
    for (int64_t j = 0; j < C; j += run) {
      const int64_t count = std::min(run, C - j);
      std::fill(sums, sums + count, 0.0);
      for (int64_t p = n; p < predictions; p += N) {
        const T* part = f + (p * C + i) * C + j;
        for (int64_t k = 0; k < count; ++k) sums[k] += static_cast<double>(part[k]);
      }
      for (int64_t k = 0; k < count; ++k) row[j + k] = static_cast<T>(sums[k] * coefficient);
    }
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
