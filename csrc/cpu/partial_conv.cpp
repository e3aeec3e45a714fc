// CPU registration of partial_conv: its kernels around a library convolution, see partial_conv_kernels.cpp.
#include "cpu/isa.h"

#if defined(IK_ISA_GENERIC)

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/convert.h"
#include "cpu/output.h"
#include "cpu/partial_conv_kernels.h"
#include "cpu/partial_conv_op.h"
#include "cpu/torch_dtype.h"

namespace ik {
namespace {

const PartialConvKernels& kernels_for(bool wide) {
  return wide ? generic::partial_conv_kernels_wide : IK_PICK_ISA(partial_conv_kernels);
}

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
  if (wide) {
    generic::convert_to(dtype, ready.const_data_ptr(), count, reinterpret_cast<double*>(out.data()));
  } else {
    generic::convert_to(dtype, ready.const_data_ptr(), count, reinterpret_cast<float*>(out.data()));
  }
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

template <typename Kernel>
void run(const PartialConvCall& call, Kernel kernel) {
  if (call.samples * call.channels * call.pixels == 0) return;
  const int64_t elements = call.channels * std::min(call.pixels, PartialConvCall::tile);
  const int64_t grain = 65536 / elements + 1;
  torch::stable::parallel_for(0, call.units(), grain,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

}  // namespace

void partial_conv_mask_input(const Tensor& input, const std::optional<Tensor>& mask, Tensor out) {
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
  run(call, kernels_for(wide).mask_input);
}

namespace {

void set_finish(PartialConvCall& call, const Tensor& ratio, const Tensor& new_mask, bool weigh_bias,
                bool scale_bias, const std::string& activation, double slope) {
  call.ratio = planes_of(ratio, call, "ratio");
  call.new_mask = planes_of(new_mask, call, "new_mask");
  call.how = parse_finish(weigh_bias, scale_bias, activation);
  call.slope = call.how.activation == Activation::relu ? 0.0 : slope;
}

}  // namespace

void partial_conv_finish(const Tensor& raw, const Tensor& ratio, const Tensor& new_mask,
                         const std::optional<Tensor>& bias, bool weigh_bias, bool scale_bias,
                         const std::string& activation, double slope, Tensor out) {
  PartialConvCall call = make_call(raw, out, "raw");
  set_finish(call, ratio, new_mask, weigh_bias, scale_bias, activation, slope);
  const bool wide = is_double(ratio);
  std::vector<char> values;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->numel() == call.channels, "bias must have a value for every channel");
    values = converted(*bias, wide);
  } else {
    values.assign(static_cast<size_t>(call.channels) * (wide ? sizeof(double) : sizeof(float)), 0);
  }
  call.bias = values.data();
  run(call, kernels_for(wide).finish);
}

namespace {

template <typename T>
void add_units(const std::vector<T>& sums, int64_t channels, Tensor& out) {
  std::vector<double> total(static_cast<size_t>(channels), 0.0);
  for (size_t i = 0; i < sums.size(); ++i) total[i % static_cast<size_t>(channels)] += sums[i];
  T* values = static_cast<T*>(out.mutable_data_ptr());
  for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<T>(total[static_cast<size_t>(c)]);
}

template <typename T>
void differentiate(PartialConvCall& call, bool need_bias, Tensor& bias_grad) {
  std::vector<T> sums(static_cast<size_t>(call.units() * call.channels));
  call.bias_sums = sums.data();
  run(call, kernels_for(sizeof(T) == 8).finish_backward);
  if (need_bias) add_units(sums, call.channels, bias_grad);
}

}  // namespace

Tensor partial_conv_finish_backward(const Tensor& grad, const std::optional<Tensor>& output,
                                    const Tensor& ratio, const Tensor& new_mask, bool weigh_bias,
                                    bool scale_bias, const std::string& activation, double slope,
                                    bool need_bias, Tensor out) {
  PartialConvCall call = make_call(grad, out, "grad");
  set_finish(call, ratio, new_mask, weigh_bias, scale_bias, activation, slope);
  if (call.how.activation != Activation::none) {
    STD_TORCH_CHECK(output.has_value() && same_sizes(*output, grad), "output must have grad's shape");
    call.output = view_of(*output, "output");
  }
  Tensor bias_grad = empty_1d(grad, need_bias ? call.channels : 0, ratio.scalar_type());
  is_double(ratio) ? differentiate<double>(call, need_bias, bias_grad)
                   : differentiate<float>(call, need_bias, bias_grad);
  return bias_grad;
}

namespace {

template <typename Call, typename Kernel>
void run_rows(const Call& call, int64_t count, int64_t elements, Kernel kernel) {
  if (count == 0) return;
  torch::stable::parallel_for(0, count, 32768 / std::max<int64_t>(elements, 1) + 1,
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

std::tuple<Tensor, Tensor> window(const Tensor& mask, int64_t groups, int64_t multiplicity,
                                  const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                  double numerator, const std::string& update, ScalarType dtype) {
  const WindowShape shape = window_shape(mask, groups, kernel, stride, padding, dilation);
  WindowCall call;
  call.mask = mask.const_data_ptr();
  call.mask_dtype = dtype_code(mask.scalar_type());
  call.samples = shape.samples;
  call.groups = shape.groups;
  call.members = shape.members;
  call.multiplicity = mask.size(1) == 1 ? multiplicity : 1;
  std::copy(shape.mask_stride, shape.mask_stride + 5, call.mask_stride);
  for (int i = 0; i < 3; ++i) {
    call.size[i] = shape.size[i];
    call.out_size[i] = shape.out_size[i];
    call.kernel[i] = shape.kernel[i];
    call.stride[i] = shape.stride[i];
    call.padding[i] = shape.padding[i];
    call.dilation[i] = shape.dilation[i];
  }
  call.numerator = numerator;
  call.update = parse_update(update);
  Tensor ratio = empty_strided(mask, shape.out_sizes, shape.out_strides, dtype);
  Tensor new_mask = empty_strided(mask, shape.out_sizes, shape.out_strides, dtype);
  if (ratio.numel() == 0) return {ratio, new_mask};
  call.ratio = ratio.mutable_data_ptr();
  call.new_mask = new_mask.mutable_data_ptr();
  const bool wide = dtype == ScalarType::Double;
  const WindowKernels& kernels = wide ? generic::window_kernels_wide : IK_PICK_ISA(window_kernels);
  std::unique_ptr<char[]> planes;
  if (mask.size(1) == 1 && call.multiplicity == 1 && mask.is_contiguous() && mask.scalar_type() == dtype) {
    call.planes = const_cast<void*>(mask.const_data_ptr());
  } else {
    planes.reset(new char[static_cast<size_t>(call.samples * call.groups * call.pixels()) * (wide ? 8 : 4)]);
    call.planes = planes.get();
    run_rows(call, call.sum_units(), std::min(call.pixels(), WindowCall::tile) * call.members,
             kernels.sum_channels);
  }
  run_rows(call, call.rows(), call.out_size[2] * (shape.kernel[0] * shape.kernel[1] + shape.kernel[2]),
           kernels.sum_windows);
  return {ratio, new_mask};
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("partial_conv_window_cpu", TORCH_BOX(&ik::window));
  m.impl("partial_conv_mask_input_cpu", TORCH_BOX(&ik::partial_conv_mask_input));
  m.impl("partial_conv_finish_cpu", TORCH_BOX(&ik::partial_conv_finish));
  m.impl("partial_conv_finish_backward_cpu", TORCH_BOX(&ik::partial_conv_finish_backward));
}

#endif
