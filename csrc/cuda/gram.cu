// gram on CUDA: batched Gram matrices of feature maps.
//
//   forward   G_n = s X_n X_n^T, X_n [C, M]
//   backward  d / d X_n = s (dG_n + dG_n^T) X_n
//
// Saved for backward: a reference to the features. Two launches forward, three backward. Work split, bytes
// and numerics: gram_kernels.cuh, symmetric_product.cuh, gram_tile.cuh.
#include <torch/csrc/stable/library.h>

#include "cuda/gram_launch.cuh"

namespace ik::cuda {
namespace {

double scale_of(const Features& x, const std::string& normalize) {
  return gram_scale(parse_gram_normalize(normalize), static_cast<double>(x.channels()),
                    static_cast<double>(x.pixels()));
}

Tensor gram(const Tensor& features,  // [N, C, H, W]
            const std::string& normalize) {
  const DeviceScope device(features);
  const Features x(features);
  return gram_matrices(x, scale_of(x, normalize), device);
}

Tensor gram_backward(const Tensor& grad,      // [N, C, C]
                     const Tensor& features,  // [N, C, H, W]
                     const std::string& normalize) {
  const DeviceScope device(features);
  const Features x(features);
  const float scale = static_cast<float>(scale_of(x, normalize));
  return symmetric_products({Product{x, grad, /*add_transposed=*/true, scale, nullptr}}, device)[0];
}

}  // namespace
}  // namespace ik::cuda

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CUDA, m) {
  m.impl("gram_cuda", TORCH_BOX(&ik::cuda::gram));
  m.impl("gram_backward_cuda", TORCH_BOX(&ik::cuda::gram_backward));
}
