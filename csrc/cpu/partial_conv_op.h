// The kernels of partial_conv on tensors (partial_conv.cpp), as partial_conv_layer.cpp calls them.
#pragma once

#include <optional>
#include <string>

#include "common/partial_conv_args.h"

namespace ik {

// `out` and the first tensor may be one; all are dense, see dense_layout.
void partial_conv_mask_input(const Tensor& input, const std::optional<Tensor>& mask, Tensor out);

void partial_conv_finish(const Tensor& raw, const Tensor& ratio, const Tensor& new_mask,
                         const std::optional<Tensor>& bias, bool weigh_bias, bool scale_bias,
                         const std::string& activation, double slope, Tensor out);

Tensor partial_conv_finish_backward(const Tensor& grad, const std::optional<Tensor>& output,
                                    const Tensor& ratio, const Tensor& new_mask, bool weigh_bias,
                                    bool scale_bias, const std::string& activation, double slope,
                                    bool need_bias, Tensor out);

}  // namespace ik
