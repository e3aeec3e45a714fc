// partial_conv: its kernels around a library convolution, see isa/partial_conv.cpp, and a layer and its
// backward in one call each. With the same steps in Python and an operator for each kernel, a layer of
// 1x16x64x64 took 10 % longer.
#include "cpu/partial_conv.h"

#include "common/partial_conv_args.h"
#include "cpu/temporary.h"

namespace ik {
namespace {

ImageView view_of(const Tensor& t, const char* name) {
  const DenseLayout layout = dense_layout(t, name);
  ImageView view;
  view.data = const_cast<void*>(t.const_data_ptr());
  view.dtype = dtype_code(t.scalar_type());
  view.interleaved = layout.interleaved;
  view.stride_n = t.size(0) == 1 ? 0 : layout.channels * layout.pixels;
  view.stride_c = layout.interleaved ? 1 : layout.pixels;
  view.stride_s = layout.interleaved ? layout.channels : 1;
  return view;
}

PlaneView planes_of(const Tensor& t, const PartialConvCall& call, const char* name) {
  const DenseLayout layout = dense_layout(t, name);
  STD_TORCH_CHECK(t.is_contiguous() && layout.pixels == call.pixels && call.channels % layout.channels == 0 &&
                      (t.size(0) == 1 || t.size(0) == call.samples),
                  name, " does not fit the convolution's result");
  PlaneView view;
  view.data = t.const_data_ptr();
  view.planes = layout.channels;
  view.stride_n = t.size(0) == 1 ? 0 : layout.channels * layout.pixels;
  return view;
}

// A vector of any floating dtype in the type computed in.
std::vector<char> converted(const Tensor& t, bool wide) {
  const Tensor ready = torch::stable::contiguous(t);
  const int64_t count = ready.numel();
  std::vector<char> out(static_cast<size_t>(count) * (wide ? sizeof(double) : sizeof(float)));
  const Dtype dtype = dtype_code(ready.scalar_type());
  wide ? generic::convert_to(dtype, ready.const_data_ptr(), count, reinterpret_cast<double*>(out.data()))
       : generic::convert_to(dtype, ready.const_data_ptr(), count, reinterpret_cast<float*>(out.data()));
  return out;
}

PartialConvCall make_call(const Tensor& source, Tensor& out, const char* name) {
  PartialConvCall call;
  const DenseLayout layout = dense_layout(source, name);
  STD_TORCH_CHECK(same_sizes(source, out), name, " and out differ in shape");
  call.samples = source.size(0);
  call.channels = layout.channels;
  call.pixels = layout.pixels;
  call.source = view_of(source, name);
  call.result = view_of(out, "out");
  if (out.const_data_ptr() != source.const_data_ptr()) {
    ask_for_huge_pages(call.result.data, out.numel() * static_cast<int64_t>(out.element_size()));
  }
  return call;
}

void run(const PartialConvCall& call, Kernel<PartialConvCall> kernel) {
  const int64_t elements = call.channels * std::min(call.pixels, PartialConvCall::tile);
  if (elements > 0) run_units(call, kernel, call.units(), 65536 / elements + 1);
}

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

void mask_input(const Tensor& input, const std::optional<Tensor>& mask, Tensor out) {
  PartialConvCall call = make_call(input, out, "input");
  const bool wide = is_double(input) || is_double(out);
  std::vector<char> plane;
  if (mask.has_value()) {
    const DenseLayout layout = dense_layout(*mask, "mask");
    STD_TORCH_CHECK(layout.pixels == call.pixels &&
                        (layout.channels == 1 || layout.channels == call.channels) &&
                        (mask->size(0) == 1 || mask->size(0) == call.samples),
                    "mask does not fit input");
    if (layout.channels > 1) {
      call.mask = view_of(*mask, "mask");
    } else {
      call.single_mask.stride_n = mask->size(0) == 1 ? 0 : layout.pixels;
      call.single_mask.data = mask->const_data_ptr();
      if (mask->scalar_type() != (wide ? ScalarType::Double : ScalarType::Float)) {
        plane = converted(*mask, wide);
        call.single_mask.data = plane.data();
      }
    }
  }
  run(call, IK_PICK_ISA(partial_conv_kernels, wide).mask_input);
}

void set_finish(PartialConvCall& call, const Tensor& ratio, const Tensor& new_mask, int64_t how,
                double slope) {
  call.ratio = planes_of(ratio, call, "ratio");
  call.new_mask = planes_of(new_mask, call, "new_mask");
  call.how = parse_finish(how);
  call.slope = slope;
}

void finish_raw(const Tensor& raw, const Tensor& ratio, const Tensor& new_mask,
                const std::optional<Tensor>& bias, int64_t how, double slope, Tensor out) {
  PartialConvCall call = make_call(raw, out, "raw");
  set_finish(call, ratio, new_mask, how, slope);
  const bool wide = is_double(ratio);
  std::vector<char> values;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->numel() == call.channels, "bias must have a value for every channel");
    values = converted(*bias, wide);
  } else {
    values.assign(static_cast<size_t>(call.channels) * (wide ? sizeof(double) : sizeof(float)), 0);
  }
  call.bias = values.data();
  run(call, IK_PICK_ISA(partial_conv_kernels, wide).finish);
}

Tensor finish_backward(const Tensor& grad, const std::optional<Tensor>& output, const Tensor& ratio,
                       const Tensor& new_mask, int64_t how, double slope, bool need_bias, Tensor out) {
  PartialConvCall call = make_call(grad, out, "grad");
  set_finish(call, ratio, new_mask, how, slope);
  if (call.how.activation != Activation::none) {
    STD_TORCH_CHECK(output.has_value() && same_sizes(*output, grad), "output must have grad's shape");
    call.output = view_of(*output, "output");
  }
  const bool wide = is_double(ratio);
  const int64_t count = call.units() * call.channels;
  std::vector<char> sums(static_cast<size_t>(count) * (wide ? sizeof(double) : sizeof(float)));
  call.bias_sums = sums.data();
  run(call, IK_PICK_ISA(partial_conv_kernels, wide).finish_backward);
  if (!need_bias) return empty_1d(grad, 0, ratio.scalar_type());
  std::vector<double> values(static_cast<size_t>(count)), total(static_cast<size_t>(call.channels), 0.0);
  generic::convert_to(dtype_code(ratio.scalar_type()), sums.data(), count, values.data());
  for (size_t i = 0; i < values.size(); ++i) total[i % total.size()] += values[i];
  return make_tensor(grad, total, {call.channels}, ratio.scalar_type());
}

void run_rows(const WindowCall& call, int64_t count, int64_t elements, Kernel<WindowCall> kernel) {
  run_units(call, kernel, count, kGrainElements / std::max<int64_t>(elements, 1) + 1);
}

std::tuple<Tensor, Tensor> window(const Tensor& mask, int64_t multiplicity, const Ints& windows,
                                  double numerator, const std::string& update, ScalarType dtype) {
  const Windows shape(windows);
  Tensor ready = mask;
  WindowCall call{window_shape(ready, shape)};
  if (!call.flat() && ready.stride(1) != 1) {
    ready = torch::stable::contiguous(mask);
    call = {window_shape(ready, shape)};
  }
  call.mask = ready.const_data_ptr();
  call.mask_dtype = dtype_code(mask.scalar_type());
  call.multiplicity = mask.size(1) == 1 ? multiplicity : 1;
  call.numerator = numerator;
  call.update = parse_update(update);
  Tensor ratio = empty_planes(mask, call, dtype);
  Tensor new_mask = empty_planes(mask, call, dtype);
  if (ratio.numel() == 0) return {ratio, new_mask};
  call.ratio = ratio.mutable_data_ptr();
  call.new_mask = new_mask.mutable_data_ptr();
  const bool wide = dtype == ScalarType::Double;
  const WindowKernels& kernels = IK_PICK_ISA(window_kernels, wide);
  std::unique_ptr<char[]> planes;
  if (mask.size(1) == 1 && call.multiplicity == 1 && ready.is_contiguous() && mask.scalar_type() == dtype) {
    call.planes = const_cast<void*>(ready.const_data_ptr());
  } else {
    planes.reset(new char[static_cast<size_t>(call.samples * call.groups * call.pixels()) * (wide ? 8 : 4)]);
    call.planes = planes.get();
    run_rows(call, call.sum_units(), std::min(call.pixels(), WindowCall::tile) * call.members,
             kernels.sum_channels);
  }
  run_rows(call, call.rows(), call.out_size[2] * (call.kernel[0] * call.kernel[1] + call.kernel[2]),
           kernels.sum_windows);
  return {ratio, new_mask};
}

// The stack of a call by name, through the dispatcher: the C shims of the two operators belong to Inductor, not
// to the stable ABI, and without one of them the library would not load. They spared each call some
// microseconds.
template <typename... Args>
std::array<StableIValue, sizeof...(Args)> called(const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor convolution(const Tensor& input, const Tensor& weight, const Windows& windows) {
  const Ints zeros(windows.stride.size(), 0);
  return torch::stable::detail::to<Tensor>(called("aten::convolution", input, weight, std::nullopt,
                                                  windows.stride, windows.padding, windows.dilation, false,
                                                  zeros, windows.groups)[0]);
}

// Gradients to the input and to the weight; of an operand whose partner's gradient is not wanted only the
// shape counts.
std::array<Tensor, 2> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                           const Windows& windows, bool need_input, bool need_weight) {
  using torch::stable::detail::to;
  const Ints zeros(windows.stride.size(), 0);
  const std::array<bool, 3> wanted{need_input, need_weight, false};
  const auto stack = called("aten::convolution_backward", grad, input, weight, std::nullopt, windows.stride,
                            windows.padding, windows.dilation, false, zeros, windows.groups,
                            torch::headeronly::HeaderOnlyArrayRef<bool>(wanted));
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
    mask_input(tensor_, mask, memory_->tensor());
    tensor_ = memory_->tensor();
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  std::optional<Temporary> memory_;
  Tensor tensor_;
};

// `inner`: dtype and layouts of the convolution.
Tensor layer(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& mask, const Tensor& ratio, const Tensor& new_mask,
             const Ints& windows, int64_t how, double slope, ScalarType inner, bool inner_last,
             bool output_last) {
  Tensor raw;
  {
    const Operand x(input, mask, inner_last, inner);
    raw = dense(convolution(x.tensor(), with_dtype(weight, inner), Windows(windows)));
  }
  Tensor out = raw;
  if (inner != input.scalar_type() || !has_layout(raw, output_last)) {
    out = empty_image(raw, sizes_of(raw), output_last, input.scalar_type());
  }
  finish_raw(raw, ratio, new_mask, bias, how, slope, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_backward(
    const Tensor& grad_output, const std::optional<Tensor>& input, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& output, const Tensor& ratio,
    const Tensor& new_mask, const Ints& input_size, const Ints& weight_size, bool input_last,
    bool weight_last, ScalarType dtype, const Ints& packed, int64_t how, double slope, bool need_bias,
    ScalarType inner, bool inner_last, bool inner_weight_last) {
  const Windows windows(packed);
  const Tensor grad = dense(grad_output);
  std::optional<Temporary> finished;
  finished.emplace(grad, sizes_of(grad), input.has_value() ? inner_weight_last : inner_last, inner);
  const Tensor grad_bias =
      finish_backward(grad, output, ratio, new_mask, how, slope, need_bias, finished->tensor());
  Tensor grad_weight;
  Tensor raw;
  if (input.has_value()) {
    const Operand x(*input, mask, inner_weight_last, inner);
    // With AVX2 alone the two gradients are computed in layouts of their own.
    const bool both = weight.has_value() && inner_last == inner_weight_last;
    // An operand torch asks for and does not read: in another layout than the others it would be copied.
    const Tensor w =
        both ? with_dtype(*weight, inner) : empty_image(grad, weight_size, inner_weight_last, inner);
    const auto gradients = convolution_backward(finished->tensor(), x.tensor(), w, windows, both, true);
    if (both) raw = gradients[0];
    grad_weight = in_layout(with_dtype(gradients[1], dtype), weight_last);
  } else {
    grad_weight = empty_1d(grad, 0, dtype);
  }
  if (!weight.has_value()) return {empty_1d(grad, 0, dtype), grad_weight, grad_bias};
  if (!raw.defined()) {
    const Operand g(finished->tensor(), std::nullopt, inner_last, inner);
    const Tensor x = empty_image(grad, input_size, inner_last, inner);
    raw = convolution_backward(g.tensor(), x, with_dtype(*weight, inner), windows, true, false)[0];
  }
  finished.reset();
  raw = dense(raw);
  const bool ready = inner == dtype && has_layout(raw, input_last);
  const Tensor grad_input = ready ? raw : empty_image(raw, input_size, input_last, dtype);
  if (!ready || mask.has_value()) mask_input(raw, mask, grad_input);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("partial_conv_window_cpu", TORCH_BOX(&ik::window));
  m.impl("partial_conv_mask_input_cpu", TORCH_BOX(&ik::mask_input));
  m.impl("partial_conv_finish_cpu", TORCH_BOX(&ik::finish_raw));
  m.impl("partial_conv_finish_backward_cpu", TORCH_BOX(&ik::finish_backward));
  m.impl("partial_conv_layer_cpu", TORCH_BOX(&ik::layer));
  m.impl("partial_conv_layer_backward_cpu", TORCH_BOX(&ik::layer_backward));
}
