// Everyday autograd of one layer.
#pragma once

#include <optional>
#include <tuple>

#include "layer.h"

namespace fusedrnn {

// One layer (y, h_n, c_n), recorded for autograd where an input requires grad; recompute: its gates
// are not kept. For eager calls outside torch.func transforms and forward-mode levels:
// fusedrnn/_layer.py sees to those.
std::tuple<at::Tensor, at::Tensor, at::Tensor> layer(
    const std::string& mode, const at::Tensor& x, const OptionalTensor& lengths,
    const OptionalTensor& batch_sizes, const OptionalTensor& reset, const OptionalTensor& h0,
    const OptionalTensor& c0, const std::vector<at::Tensor>& params, bool has_biases,
    bool bidirectional, bool recompute);

// The same of input (T, B, I), or (B, T, I) if batch_first, with h0 (D, B, P) and c0 (D, B, H) or
// absent; output is shaped like input. Nothing, for the caller to look closer, where an argument
// does not fit or autocast, a transform or a forward-mode level is on.
std::optional<std::tuple<at::Tensor, at::Tensor, at::Tensor>> plain_layer(
    const std::string& mode, const at::Tensor& input, const OptionalTensor& h0,
    const OptionalTensor& c0, const std::vector<at::Tensor>& params, bool has_biases,
    bool bidirectional, bool batch_first, bool recompute);

// One step of a cell, x (B, I), h and c (B, H) or absent, to (h', c'): the layer of one step
// without its axes of steps and directions. Nothing in the same cases.
std::optional<std::tuple<at::Tensor, at::Tensor>> cell_step(
    const std::string& mode, const at::Tensor& x, const OptionalTensor& h, const OptionalTensor& c,
    const std::vector<at::Tensor>& params, bool has_biases);

}  // namespace fusedrnn
