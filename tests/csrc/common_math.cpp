// The scalar mathematics that CPU and CUDA kernels share, for NumPy: tests/test_common_math.py checks every
// formula without torch and without a GPU. Not part of the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/pixel.h"
#include "common/pixel_shape.h"
#include "cpu/isa/convert.h"

namespace py = pybind11;

namespace {

template <ik::Penalty P>
using Constant = std::integral_constant<ik::Penalty, P>;

// f(a compile-time penalty) for a penalty by name.
template <typename F>
auto with_penalty(const std::string& name, F&& f) {
  if (name == "l1") return f(Constant<ik::Penalty::l1>{});
  if (name == "l2") return f(Constant<ik::Penalty::l2>{});
  if (name == "charbonnier") return f(Constant<ik::Penalty::charbonnier>{});
  if (name == "huber") return f(Constant<ik::Penalty::huber>{});
  throw std::invalid_argument("penalty " + name);
}

template <typename T>
py::object penalty_value(const std::string& name, py::array_t<T> d, T param) {
  return with_penalty(name, [&](auto penalty) -> py::object {
    return py::vectorize([param](T x) { return ik::penalty_value<decltype(penalty)::value, T>(x, param); })(
        d);
  });
}

// The gradient of l1, as the kernels compute it: through the packed bits, at each of the 8 places of a group.
template <typename T>
T sign_through_bits(T x) {
  const T result = ik::apply_sign(ik::sign_bits(x), 0, T(1));
  for (int place = 1; place < 8; ++place) {
    if (ik::apply_sign(ik::sign_bits(x) << place, place, T(1)) != result)
      throw std::logic_error("apply_sign depends on the place");
  }
  return result;
}

template <typename T>
py::object penalty_grad(const std::string& name, py::array_t<T> d, T param) {
  return with_penalty(name, [&](auto penalty) -> py::object {
    constexpr ik::Penalty P = decltype(penalty)::value;
    if constexpr (P == ik::Penalty::l1) {
      return py::vectorize(&sign_through_bits<T>)(d);
    } else {
      return py::vectorize([param](T x) { return ik::penalty_grad<P, T>(x, param); })(d);
    }
  });
}

template <typename T>
void define_for(py::module_& m, const std::string& suffix) {
  m.def(("penalty_value_" + suffix).c_str(), &penalty_value<T>);
  m.def(("penalty_grad_" + suffix).c_str(), &penalty_grad<T>);
  m.def(("sign_bits_" + suffix).c_str(), py::vectorize([](T d) { return ik::sign_bits(d); }));
  m.def(("apply_sign_" + suffix).c_str(), py::vectorize([](uint32_t word, int place, T coefficient) {
          return ik::apply_sign(word, place, coefficient);
        }));
  m.def(("select_zero_" + suffix).c_str(),
        py::vectorize([](T weight, T value) { return ik::select_zero_(weight, value); }));
}

}  // namespace

PYBIND11_MODULE(common_math, m) {
  define_for<float>(m, "f32");
  define_for<double>(m, "f64");
  py::enum_<ik::Normalize>(m, "Normalize")
      .value("mask", ik::Normalize::mask)
      .value("image", ik::Normalize::image)
      .value("sample", ik::Normalize::sample)
      .value("sum", ik::Normalize::sum);
  m.def("sample_scale", &ik::sample_scale);
  m.def("sign_layout", [](int64_t n, int64_t c, int64_t pixels, bool channels_last) {
    ik::PixelShape shape;
    shape.samples = n;
    shape.channels = c;
    shape.pixels = pixels;
    shape.segments = channels_last ? 1 : c;
    shape.length = channels_last ? pixels * c : pixels;
    return py::make_tuple(shape.numel(), 2 * n * shape.segments * shape.groups(), shape.sign_bytes());
  });
  m.def("half_to_float", py::vectorize([](uint16_t h) { return ik::IK_ISA::half_to_float(h); }));
  m.def("float_to_half", py::vectorize([](float x) { return ik::IK_ISA::float_to_half(x); }));
  m.def("float_to_bfloat16", py::vectorize([](float x) { return ik::IK_ISA::float_to_bfloat16(x); }));
}
