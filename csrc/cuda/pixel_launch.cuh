// Host side of the pixel losses on CUDA: tensors to kernel arguments, dtype dispatch, launches.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/arguments.cuh"
#include "cuda/pixel_backward.cuh"
#include "cuda/pixel_forward.cuh"

namespace ik::cuda {

template <typename Body>
void with_dtypes(ScalarType pred, ScalarType target, const Body& body) {
  with_dtype("pred", pred, [&](auto p) { with_dtype("target", target, [&](auto t) { body(p, t); }); });
}

inline MaskType mask_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return MaskType::f32;
    case ScalarType::Half:
      return MaskType::f16;
    case ScalarType::BFloat16:
      return MaskType::bf16;
    case ScalarType::Double:
      return MaskType::f64;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return MaskType::u8;
    default:
      STD_TORCH_CHECK(false, "mask: dtype must be floating, bool or uint8");
  }
}

// `mask` is what prepare_mask returned, or null.
inline MaskView mask_view(const Tensor* mask, const PixelShape& shape, const Tiling& tiling, int elements) {
  MaskView view{};
  view.repeat = 1;
  view.shared = !tiling.along;
  if (mask == nullptr) return view;
  STD_TORCH_CHECK(shape.mask_repeat <= std::numeric_limits<int32_t>::max(), "mask: too many channels");
  view.data = mask->const_data_ptr();
  view.stride_n = shape.mask_stride_n;
  view.stride_c = shape.mask_stride_c;
  view.repeat = static_cast<int32_t>(shape.mask_repeat);
  view.type = mask_type(mask->scalar_type());
  view.cap = mask->scalar_type() == ScalarType::Bool ? 1.0f : 255.0f;
  view.shared = !tiling.along && shape.mask_stride_c == 0;
  view.aligned = view.type != MaskType::f64 && view.repeat == 1 && shape.length % elements == 0 &&
                 view.stride_n % elements == 0 && view.stride_c % elements == 0 &&
                 is_aligned(view.data, elements * static_cast<int64_t>(mask->element_size()));
  return view;
}

inline unsigned grid_size(const Tiling& tiling, int64_t samples) {
  const int64_t blocks = samples * tiling.tiles_per_sample();
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "pred: too many elements for one launch");
  return static_cast<unsigned>(blocks);
}

inline bool allows_vectors(const void* data, int64_t length, int elements, int64_t element_size) {
  return length % elements == 0 && is_aligned(data, elements * element_size);
}

inline const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

struct ForwardCall {
  const Tensor& pred;    // [N, C, H, W]
  const Tensor& target;  // [N, C, H, W]
  const Tensor* mask;    // [H, W] or [N|1, C|1, H, W] or null
  Penalty penalty;
  float param;
  Normalize normalize;
  bool mask_is_hole;
  bool save_signs;
};

struct ForwardResult {
  Tensor loss[2];
  Tensor scale;
  Tensor signs;
};

// One streaming kernel, then for the reductions one small kernel that adds the partial sums.
template <Mode kMode>
ForwardResult run_forward(const ForwardCall& call) {
  constexpr int R = kRegions<kMode>;
  const DeviceScope device(call.pred);
  const auto sizes = call.pred.sizes();
  STD_TORCH_CHECK(sizes.size() == 4, "pred must have 4 dimensions (N, C, H, W)");
  const std::vector<int64_t> size(sizes.begin(), sizes.end());
  const bool channels_last = !call.pred.is_contiguous() && is_channels_last(call.pred);
  const Tensor pred = in_layout(call.pred, channels_last);
  const Tensor target = in_layout(call.target, channels_last);
  PixelShape shape = pixel_shape(size, channels_last);
  std::optional<Tensor> mask;
  if (call.mask != nullptr) mask = prepare_mask(*call.mask, size, channels_last, shape);
  STD_TORCH_CHECK(!call.save_signs || call.penalty == Penalty::l1, "save_signs needs penalty l1");

  const bool map = kMode == Mode::map;
  ForwardResult result{{map ? empty_image(pred, size, channels_last, ScalarType::Float)
                            : empty_scalar(pred, ScalarType::Float),
                        R == 2 ? empty_scalar(pred, ScalarType::Float) : pred},
                       map ? empty_1d(pred, 0, ScalarType::Float)
                           : empty_strided(pred, {shape.samples, R}, {R, 1}, ScalarType::Float),
                       empty_1d(pred, call.save_signs ? shape.sign_bytes() : 0, ScalarType::Byte)};
  std::optional<Tensor> partials;
  int64_t tiles = 0;
  if (shape.numel() > 0) {
    with_dtypes(pred.scalar_type(), target.scalar_type(), [&](auto p, auto t) {
      using P = typename decltype(p)::type;
      using T = typename decltype(t)::type;
      constexpr int E = kElements<P, T, kMode>;
      ForwardArgs args{};
      args.tiling = make_tiling(shape.samples, shape.segments, shape.length, E);
      args.mask = mask_view(mask ? &*mask : nullptr, shape, args.tiling, E);
      args.pred = pred.const_data_ptr();
      args.target = target.const_data_ptr();
      if (call.save_signs) args.signs = static_cast<uint16_t*>(result.signs.mutable_data_ptr());
      args.sign_words = shape.samples * shape.segments * shape.groups();
      args.sign_words_allocated = shape.sign_bytes() / 2;
      args.penalty = call.penalty;
      args.param = call.param;
      args.mask_is_hole = call.mask_is_hole;
      args.aligned = allows_vectors(args.pred, shape.length, E, sizeof(P)) &&
                     allows_vectors(args.target, shape.length, E, sizeof(T));
      const unsigned blocks = grid_size(args.tiling, shape.samples);
      if constexpr (map) {
        args.map = static_cast<float*>(result.loss[0].mutable_data_ptr());
      } else {
        tiles = args.tiling.tiles_per_sample();
        partials = empty_1d(pred, 2 * R * static_cast<int64_t>(blocks), ScalarType::Float);
        args.partials = partials->mutable_data_ptr();
      }
      const bool l1 = call.penalty == Penalty::l1;
      launch(l1 ? pixel_forward<P, T, kMode, true> : pixel_forward<P, T, kMode, false>, blocks, kThreads,
             device, args);
    });
  }
  if constexpr (!map) {
    // Also for empty images: it writes the zeros.
    FinalArgs args{};
    args.partials = partials ? partials->const_data_ptr() : nullptr;
    for (int r = 0; r < R; ++r) args.loss[r] = static_cast<float*>(result.loss[r].mutable_data_ptr());
    args.scale = static_cast<float*>(result.scale.mutable_data_ptr());
    args.samples = shape.samples;
    args.tiles = tiles;
    args.numel = static_cast<double>(shape.numel());
    args.normalize = call.normalize;
    launch(pixel_finalize<R>, 1, kFinalThreads, device, args, finalize_lanes(shape.samples, tiles));
  }
  return result;
}

struct BackwardCall {
  const Tensor* grad[2];  // scalars, one per region, or grad[0] = the gradient of the map [N, C, H, W]
  const Tensor& scale;    // [N, R]; the map uses its device only
  const Tensor* signs;    // [bytes], l1
  const Tensor* mask;
  const Tensor* pred;  // [N, C, H, W], other penalties
  const Tensor* target;
  const std::vector<int64_t>& size;
  bool channels_last;
  ScalarType pred_dtype;
  ScalarType target_dtype;
  Penalty penalty;
  float param;
  bool mask_is_hole;
  bool need_pred;
  bool need_target;
};

// Strides of a map gradient as one step along each segment; false if the segment has no single step.
inline bool single_step(const Tensor& grad, const PixelShape& shape, const std::vector<int64_t>& size,
                        MapGrad& view) {
  const auto strides = grad.strides();
  const int64_t H = size[2];
  const int64_t W = size[3];
  if (H > 1 && W > 1 && strides[2] != W * strides[3]) return false;
  const int64_t pixel_step = W > 1 ? strides[3] : strides[2];
  view.stride_n = strides[0];
  view.stride_c = strides[1];
  view.stride = pixel_step;
  if (shape.segments == shape.channels) return true;
  view.stride_c = 0;
  view.stride = strides[1];
  return shape.pixels == 1 || pixel_step == shape.channels * strides[1];
}

template <Mode kMode>
std::tuple<Tensor, Tensor> run_backward(const BackwardCall& call) {
  constexpr int R = kRegions<kMode>;
  constexpr bool kMap = kMode == Mode::map;
  const Tensor& like = call.scale;
  const DeviceScope device(like);
  PixelShape shape = pixel_shape(call.size, call.channels_last);
  const auto gradient = [&](bool needed, ScalarType dtype) {
    return needed ? empty_image(like, call.size, call.channels_last, dtype) : empty_1d(like, 0, dtype);
  };
  Tensor grad_pred = gradient(call.need_pred, call.pred_dtype);
  Tensor grad_target = gradient(call.need_target, call.target_dtype);
  if (shape.numel() == 0 || !(call.need_pred || call.need_target)) return {grad_pred, grad_target};

  const bool l1 = call.penalty == Penalty::l1;
  STD_TORCH_CHECK(l1 ? call.signs != nullptr && call.signs->numel() == shape.sign_bytes()
                     : call.pred != nullptr && call.target != nullptr,
                  l1 ? "signs: missing or of the wrong size" : "pred and target are needed");
  std::optional<Tensor> mask, pred, target, map_grad;
  if (call.mask != nullptr) mask = prepare_mask(*call.mask, call.size, call.channels_last, shape);
  if (!l1) {
    pred = in_layout(*call.pred, call.channels_last);
    target = in_layout(*call.target, call.channels_last);
  }
  // The l1 kernel does not look at the images: a gradient nobody wants must not choose its vector width.
  const ScalarType pred_dtype = l1 && !call.need_pred ? call.target_dtype : call.pred_dtype;
  const ScalarType target_dtype = l1 && !call.need_target ? call.pred_dtype : call.target_dtype;
  with_dtypes(pred_dtype, target_dtype, [&](auto p, auto t) {
    using P = typename decltype(p)::type;
    using T = typename decltype(t)::type;
    constexpr int E = kElements<P, T, kMode>;
    BackwardArgs args{};
    args.tiling = make_tiling(shape.samples, shape.segments, shape.length, E);
    args.mask = mask_view(mask ? &*mask : nullptr, shape, args.tiling, E);
    args.aligned = shape.length % E == 0;
    if constexpr (kMap) {
      map_grad = *call.grad[0];
      STD_TORCH_CHECK(map_grad->numel() == shape.numel(), "grad: expected the shape of pred");
      if (!single_step(*map_grad, shape, call.size, args.map)) {
        map_grad = in_layout(*map_grad, call.channels_last);
        single_step(*map_grad, shape, call.size, args.map);
      }
      args.map.data = float_data(*map_grad, "grad");
      args.map.aligned = args.map.stride == 1 && args.map.stride_n % E == 0 && args.map.stride_c % E == 0 &&
                         allows_vectors(args.map.data, shape.length, E, sizeof(float));
    } else {
      for (int r = 0; r < R; ++r) {
        if (call.grad[r] != nullptr) args.grad[r] = float_data(*call.grad[r], "grad");
      }
      args.scale = float_data(call.scale, "scale");
      STD_TORCH_CHECK(call.scale.numel() == shape.samples * R && call.scale.is_contiguous(),
                      "scale: expected a contiguous [N, regions] tensor");
    }
    if (l1) {
      args.signs = static_cast<const uint16_t*>(call.signs->const_data_ptr());
    } else {
      args.pred = pred->const_data_ptr();
      args.target = target->const_data_ptr();
      args.aligned =
          args.aligned && is_aligned(args.pred, E * sizeof(P)) && is_aligned(args.target, E * sizeof(T));
    }
    if (call.need_pred) args.grad_pred = grad_pred.mutable_data_ptr();
    if (call.need_target) args.grad_target = grad_target.mutable_data_ptr();
    args.penalty = call.penalty;
    args.param = call.param;
    args.mask_is_hole = call.mask_is_hole;
    const unsigned blocks = grid_size(args.tiling, shape.samples);
    launch(l1 ? pixel_backward<P, T, kMode, true> : pixel_backward<P, T, kMode, false>, blocks, kThreads,
           device, args);
  });
  return {grad_pred, grad_target};
}

}  // namespace ik::cuda
