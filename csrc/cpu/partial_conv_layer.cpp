// A partial convolution and its backward in one call each: torch's convolution between the kernels of
// partial_conv.cpp. With the same steps in Python and an operator for each kernel, a layer of 1x16x64x64 took
// 10 % longer.
#include "cpu/isa.h"

#if defined(IK_ISA_GENERIC)

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/partial_conv_op.h"
#include "cpu/temporary.h"

namespace ik {
namespace {

using Ints = std::vector<int64_t>;

struct Windows {
  const Ints& stride;
  const Ints& padding;
  const Ints& dilation;
  int64_t groups;
};

// By name, through the dispatcher: the C shims of the two operators belong to Inductor, not to the stable
// ABI, and without one of them the library would not load. They spared each call some microseconds.
Tensor convolution(const Tensor& input, const Tensor& weight, const Windows& windows) {
  using torch::stable::detail::from;
  const Ints zeros(windows.stride.size(), 0);
  std::array<StableIValue, 9> stack{from(input),          from(weight),          from(std::nullopt),
                                    from(windows.stride), from(windows.padding), from(windows.dilation),
                                    from(false),          from(zeros),           from(windows.groups)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Gradients to the input and to the weight; of an operand whose partner's gradient is not wanted only the
// shape counts.
std::array<Tensor, 2> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                           const Windows& windows, bool need_input, bool need_weight) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const Ints zeros(windows.stride.size(), 0);
  const std::array<bool, 3> wanted{need_input, need_weight, false};
  std::array<StableIValue, 11> stack{from(grad),
                                     from(input),
                                     from(weight),
                                     from(std::nullopt),
                                     from(windows.stride),
                                     from(windows.padding),
                                     from(windows.dilation),
                                     from(false),
                                     from(zeros),
                                     from(windows.groups),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  (void)to<Tensor>(stack[2]);
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

Tensor dense(const Tensor& t) {
  return t.is_contiguous() || is_channels_last(t) ? t : torch::stable::contiguous(t);
}

Tensor with_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// What is convolved: the masked input in the library's dtype and layout, in memory that lives as long as
// this.
class Operand {
 public:
  Operand(const Tensor& input, const std::optional<Tensor>& mask, bool channels_last, ScalarType dtype)
      : tensor_(dense(input)) {
    if (!mask.has_value() && tensor_.scalar_type() == dtype && has_layout(tensor_, channels_last)) return;
    memory_.emplace(tensor_, sizes_of(tensor_), channels_last, dtype);
    partial_conv_mask_input(tensor_, mask, memory_->tensor());
    tensor_ = memory_->tensor();
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  std::optional<Temporary> memory_;
  Tensor tensor_;
};

Tensor layer(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& mask, const Tensor& ratio, const Tensor& new_mask,
             const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups, bool weigh_bias,
             bool scale_bias, const std::string& activation, double slope, ScalarType dtype,
             bool channels_last, bool output_channels_last) {
  Tensor raw;
  {
    const Operand x(input, mask, channels_last, dtype);
    raw = dense(convolution(x.tensor(), with_dtype(weight, dtype), {stride, padding, dilation, groups}));
  }
  Tensor out = raw;
  if (dtype != input.scalar_type() || !has_layout(raw, output_channels_last)) {
    out = empty_image(raw, sizes_of(raw), output_channels_last, input.scalar_type());
  }
  partial_conv_finish(raw, ratio, new_mask, bias, weigh_bias, scale_bias, activation, slope, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_backward(
    const Tensor& grad_output, const std::optional<Tensor>& input, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& output, const Tensor& ratio,
    const Tensor& new_mask, const Ints& input_size, const Ints& weight_size, const Ints& stride,
    const Ints& padding, const Ints& dilation, int64_t groups, bool weigh_bias, bool scale_bias,
    const std::string& activation, double slope, bool need_bias, ScalarType dtype, bool channels_last,
    bool weight_channels_last, ScalarType input_dtype, bool input_last, ScalarType weight_dtype,
    bool weight_last) {
  const Windows windows{stride, padding, dilation, groups};
  const Tensor grad = dense(grad_output);
  std::optional<Temporary> finished;
  finished.emplace(grad, sizes_of(grad), input.has_value() ? weight_channels_last : channels_last, dtype);
  const Tensor grad_bias = partial_conv_finish_backward(grad, output, ratio, new_mask, weigh_bias, scale_bias,
                                                        activation, slope, need_bias, finished->tensor());
  Tensor grad_weight;
  Tensor raw;
  if (input.has_value()) {
    const Operand x(*input, mask, weight_channels_last, dtype);
    // With AVX2 alone the two gradients are computed in layouts of their own.
    const bool both = weight.has_value() && channels_last == weight_channels_last;
    // An operand torch asks for and does not read: in another layout than the others it would be copied.
    const Tensor w =
        both ? with_dtype(*weight, dtype) : empty_image(grad, weight_size, weight_channels_last, dtype);
    auto found = convolution_backward(finished->tensor(), x.tensor(), w, windows, both, true);
    if (both) raw = found[0];
    grad_weight = in_layout(with_dtype(found[1], weight_dtype), weight_last);
  } else {
    grad_weight = empty_1d(grad, 0, weight_dtype);
  }
  if (!weight.has_value()) return {empty_1d(grad, 0, input_dtype), grad_weight, grad_bias};
  if (!raw.defined()) {
    const Operand g(finished->tensor(), std::nullopt, channels_last, dtype);
    const Tensor x = empty_image(grad, input_size, channels_last, dtype);
    raw = convolution_backward(g.tensor(), x, with_dtype(*weight, dtype), windows, true, false)[0];
  }
  finished.reset();
  raw = dense(raw);
  const bool ready = dtype == input_dtype && has_layout(raw, input_last);
  const Tensor grad_input = ready ? raw : empty_image(raw, input_size, input_last, input_dtype);
  if (!ready || mask.has_value()) partial_conv_mask_input(raw, mask, grad_input);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("partial_conv_layer_cpu", TORCH_BOX(&ik::layer));
  m.impl("partial_conv_layer_backward_cpu", TORCH_BOX(&ik::layer_backward));
}

#endif
