// lpips. The kernels are in isa/columns.cpp.
#include <memory>

#include "cpu/columns.h"
#include "cpu/tensors.h"

namespace ik {
namespace {

// One layer, in the layout of its input; a target in another layout is copied.
struct ColumnTensors {
  ColumnsCall call;
  ScalarType dtype;  // of what is computed
  bool input_last, target_last;
  std::vector<int64_t> size, target_size;
  std::vector<double> weights;
  std::vector<double> counts;  // summed mask of every sample of the input, or H W
  std::vector<Tensor> ready;   // what `call` points into

  ColumnTensors(const Tensor& input, const Tensor& target, const Tensor& weight, ScalarType accumulate)
      : dtype(accumulate),
        input_last(!input.is_contiguous() && is_channels_last(input)),
        target_last(!target.is_contiguous() && is_channels_last(target)),
        size(sizes_of(input)),
        target_size(sizes_of(target)),
        weights(values_of(torch::stable::contiguous(weight))) {
    STD_TORCH_CHECK(
        size.size() == 4 &&
            std::equal(size.begin() + 1, size.end(), target_size.begin() + 1, target_size.end()) &&
            (target_size[0] == 0 ? size[0] == 0 : size[0] % target_size[0] == 0) &&
            static_cast<int64_t>(weights.size()) == size[1],
        "lpips: input, target and weights do not fit each other");
    call.samples = target_size[0];
    call.predictions = target_size[0] > 0 ? size[0] / target_size[0] : 1;
    call.channels = size[1];
    call.pixels = size[2] * size[3];
    call.channels_last = input_last;
    call.wide = dtype == ScalarType::Double;
    call.input = add(in_layout(input, input_last));
    call.target = add(in_layout(target, input_last));
    call.input_dtype = dtype_code(input.scalar_type());
    call.target_dtype = dtype_code(target.scalar_type());
    call.weights = weights.data();
    counts.assign(static_cast<size_t>(size[0]), static_cast<double>(call.pixels));
  }

  const void* add(const Tensor& tensor) {
    ready.push_back(tensor);
    return ready.back().const_data_ptr();
  }

  void set_mask(const Tensor& mask) {
    call.mask_per_prediction = mask.dim() == 4 && mask.sizes()[0] == size[0] && size[0] != target_size[0];
    PixelShape shape;
    const std::vector<int64_t> fitting = {call.mask_per_prediction ? size[0] : target_size[0], 1, size[2],
                                          size[3]};
    call.mask = add(prepare_mask(mask, fitting, false, shape));
    call.mask_dtype = dtype_code(mask.scalar_type());
    call.mask_stride = shape.mask_stride_n;
    std::vector<double> plane(static_cast<size_t>(call.pixels));
    for (int64_t n = 0; n < size[0]; ++n) {
      const int64_t sample = call.mask_per_prediction ? n : n % call.samples;
      if (n > 0 && (call.mask_stride == 0 || sample != n)) {
        counts[n] = counts[call.mask_stride == 0 ? 0 : sample];
        continue;
      }
      const char* data =
          static_cast<const char*>(call.mask) + sample * call.mask_stride * dtype_bytes(call.mask_dtype);
      generic::convert_to(call.mask_dtype, data, call.pixels, plane.data());
      counts[n] = 0;
      for (const double value : plane) counts[n] += value;
    }
  }

  // Of the mean over the pixels of sample n.
  double share(int64_t n) const { return counts[n] == 0 ? 0.0 : 1.0 / counts[n]; }

  void run(Kernel<ColumnsCall> Kernels<ColumnsCall>::* kernel) const {
    const int64_t elements = call.predictions * call.channels * call.step();
    run_units(call, IK_PICK_ISA(columns_kernels, call.wide).*kernel, call.units(),
              kGrainElements / std::max<int64_t>(elements, 1) + 1);
  }
};

void check_layers(size_t layers, size_t target, size_t weights, size_t mask) {
  STD_TORCH_CHECK(layers > 0 && target == layers && weights == layers && (mask == 0 || mask == layers),
                  "lpips: input, target, weights and mask must have one entry for each layer");
}

std::tuple<Tensor, std::vector<Tensor>> lpips(const std::vector<Tensor>& input,    // [k N, C, H, W] each
                                              const std::vector<Tensor>& target,   // [N, C, H, W]
                                              const std::vector<Tensor>& weights,  // [C]
                                              const std::vector<Tensor>& mask,     // none, or one each
                                              double eps, bool save) {
  check_layers(input.size(), target.size(), weights.size(), mask.size());
  const ScalarType dtype = accumulate_type(input, target);
  std::vector<double> values(static_cast<size_t>(input[0].sizes()[0]), 0.0);
  std::vector<Tensor> saved;
  for (size_t i = 0; i < input.size(); ++i) {
    ColumnTensors t(input[i], target[i], weights[i], dtype);
    ColumnsCall& call = t.call;
    STD_TORCH_CHECK(t.size[0] == static_cast<int64_t>(values.size()), "lpips: layers differ in their batch");
    if (!mask.empty()) t.set_mask(mask[i]);
    call.eps = eps;
    const std::vector<int64_t> planes = {4, t.size[0], t.size[2], t.size[3]};
    saved.push_back(save ? empty_output(input[i], planes, false, dtype) : empty_1d(input[i], 0, dtype));
    if (save) call.saved = saved.back().mutable_data_ptr();
    std::unique_ptr<double[]> partials(new double[static_cast<size_t>(call.units() * call.predictions)]);
    call.partials = partials.get();
    t.run(&Kernels<ColumnsCall>::forward);
    for (int64_t n = 0; n < t.size[0]; ++n) {
      const double* part =
          partials.get() + n % call.samples * call.blocks() * call.predictions + n / call.samples;
      double sum = 0;
      for (int64_t b = 0; b < call.blocks(); ++b) sum += part[b * call.predictions];
      values[n] += sum * t.share(n);
    }
  }
  return {make_tensor(input[0], values, {static_cast<int64_t>(values.size())}, dtype), saved};
}

std::vector<Tensor> lpips_backward(const Tensor& grad,  // [k N]
                                   const std::vector<Tensor>& input, const std::vector<Tensor>& target,
                                   const std::vector<Tensor>& weights, const std::vector<Tensor>& mask,
                                   const std::vector<Tensor>& saved,  // [4, k N, H, W] each
                                   const std::vector<int64_t>& wanted) {
  check_layers(input.size(), target.size(), weights.size(), mask.size());
  STD_TORCH_CHECK(saved.size() == input.size() && wanted.size() == input.size(),
                  "lpips: saved and wanted must have one entry for each layer");
  const std::vector<double> upstream = values_of(torch::stable::contiguous(grad));
  int64_t bytes = 0;
  for (size_t i = 0; i < input.size(); ++i) {
    bytes += wanted[i] & 1 ? input[i].numel() * static_cast<int64_t>(input[i].element_size()) : 0;
    bytes += wanted[i] & 2 ? target[i].numel() * static_cast<int64_t>(target[i].element_size()) : 0;
  }
  std::vector<Tensor> out;
  for (size_t i = 0; i < input.size(); ++i) {
    ColumnTensors t(input[i], target[i], weights[i], saved[i].scalar_type());
    ColumnsCall& call = t.call;
    if (!mask.empty()) t.set_mask(mask[i]);
    std::vector<double> factors(upstream);
    for (int64_t n = 0; n < t.size[0]; ++n) factors[n] *= t.share(n);
    call.factors = factors.data();
    call.saved = const_cast<void*>(t.add(torch::stable::contiguous(saved[i])));
    // Rows that begin anywhere in a cache line are written partly through the cache: then all of it is faster.
    const int64_t run = t.input_last ? call.channels : call.pixels;
    call.stream = bytes > kStreamBytes && run * static_cast<int64_t>(input[i].element_size()) % 64 == 0;
    if (wanted[i] & 1) {
      out.push_back(empty_output(input[i], t.size, t.input_last, input[i].scalar_type()));
      call.grad_input = out.back().mutable_data_ptr();
    }
    if (wanted[i] & 2) {
      out.push_back(empty_output(target[i], t.target_size, t.input_last, target[i].scalar_type()));
      call.grad_target = out.back().mutable_data_ptr();
    }
    t.run(&Kernels<ColumnsCall>::backward);
    if (wanted[i] & 2) out.back() = in_layout(out.back(), t.target_last);
  }
  return out;
}

}  // namespace
}  // namespace ik

STABLE_TORCH_LIBRARY_IMPL(inpaint_kernels, CPU, m) {
  m.impl("lpips_cpu", TORCH_BOX(&ik::lpips));
  m.impl("lpips_backward_cpu", TORCH_BOX(&ik::lpips_backward));
}
