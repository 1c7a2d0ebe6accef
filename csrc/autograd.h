// Everyday autograd of one layer.
#pragma once

#include <tuple>

#include "layer.h"

namespace fusedrnn {

// One layer (y, h_n, c_n), recorded for autograd where an input requires grad. For eager calls
// outside torch.func transforms and forward-mode levels: fusedrnn/_layer.py sees to those.
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer(
    const std::string& mode, const at::Tensor& x, const OptionalTensor& lengths,
    const OptionalTensor& batch_sizes, const OptionalTensor& reset, const OptionalTensor& h0,
    const OptionalTensor& c0, const std::vector<at::Tensor>& params, bool has_biases,
    bool bidirectional);

}  // namespace fusedrnn
