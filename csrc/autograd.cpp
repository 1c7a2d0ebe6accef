// Everyday autograd: a node in C++, as a Function in Python takes a sixth of a short training step.
#include "autograd.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <utility>

namespace fusedrnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// An op of this library, called through the dispatcher below autograd.
template <class Signature>
class Op;
template <class Result, class... Args>
class Op<Result(Args...)> {
 public:
  explicit Op(const char* name)
      : op_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Args...)>()) {}
  Result operator()(Args... args) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op_.call(std::forward<Args>(args)...);
  }

 private:
  c10::TypedOperatorHandle<Result(Args...)> op_;
};

const Op<LayerForward>& forward_op() {
  static const Op<LayerForward> op("fusedrnn::layer_forward");
  return op;
}

const Op<LayerBackward>& backward_op() {
  static const Op<LayerBackward> op("fusedrnn::layer_backward");
  return op;
}

OptionalTensor optional(at::Tensor t) {
  return t.defined() ? OptionalTensor(std::move(t)) : std::nullopt;
}

at::Tensor tensor_or_undefined(const OptionalTensor& t) { return t.value_or(at::Tensor()); }

// Whether a torch.func transform is active.
bool transforms_active() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// What is no gradient of a gradient, and no batch of gradients: the backward op's own case.
bool everyday(const variable_list& cotangents) {
  const auto batched = [](const at::Tensor& t) {
    return t.defined() && t.key_set().has(c10::DispatchKey::Batched);
  };
  return !at::GradMode::is_enabled() && !transforms_active() &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr &&
         std::none_of(cotangents.begin(), cotangents.end(), batched);
}

// The tensor with an axis of one step, or of one direction and layer, in front, or without it.
at::Tensor lifted(const at::Tensor& t) { return t.defined() ? t.unsqueeze(0) : t; }
at::Tensor lowered(const at::Tensor& t) { return t.defined() ? t.squeeze(0) : t; }

struct SavedTensors {
  const std::string& mode;
  bool has_biases, bidirectional;
  variable_list tensors;  // x, lengths, batch_sizes, reset, h0, c0, y, gates, cells, *params

  enum { kX, kLengths, kBatchSizes, kReset, kH0, kC0, kY, kGates, kCells, kParams };
  OptionalTensor given(int index) const { return optional(tensors[index]); }
  // The op's form without axes of steps and directions.
  bool one_step() const { return tensors[kX].dim() == 2 && !tensors[kBatchSizes].defined(); }
  at::TensorList params() const { return at::TensorList(tensors).slice(kParams); }
};

// The gradients of x, h0, c0, *params; undefined where not wanted.
variable_list everyday_gradients(const SavedTensors& s, const variable_list& cotangents,
                                 const std::vector<bool>& wanted) {
  c10::List<bool> mask;
  mask.reserve(wanted.size());
  for (const bool one : wanted) mask.push_back(one);
  auto [dx, dh0, dc0, dparams] = backward_op()(
      s.mode, optional(cotangents[0]), optional(cotangents[1]), optional(cotangents[2]),
      s.tensors[SavedTensors::kX], s.given(SavedTensors::kLengths),
      s.given(SavedTensors::kBatchSizes), s.given(SavedTensors::kReset), s.given(SavedTensors::kH0),
      s.given(SavedTensors::kC0), s.params(), s.tensors[SavedTensors::kY],
      s.tensors[SavedTensors::kGates], s.tensors[SavedTensors::kCells], s.has_biases,
      s.bidirectional, mask);
  variable_list gradients = {std::move(dx), std::move(dh0), std::move(dc0)};
  std::move(dparams.begin(), dparams.end(), std::back_inserter(gradients));
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (!wanted[i]) gradients[i].reset();
  }
  return gradients;
}

// The same, composed in Python, which knows no layer without its axis of steps.
variable_list composed_gradients(SavedTensors s, variable_list cotangents,
                                 const std::vector<bool>& wanted) {
  const bool one_step = s.one_step();
  if (one_step) {
    for (const int i : {SavedTensors::kX, SavedTensors::kH0, SavedTensors::kC0, SavedTensors::kY}) {
      s.tensors[i] = lifted(s.tensors[i]);
    }
    for (at::Tensor& t : cotangents) t = lifted(t);
  }
  variable_list gradients;
  const pybind11::gil_scoped_acquire gil;
  try {
    const auto python = pybind11::module_::import("fusedrnn._layer").attr("layer_backward");
    const auto found = python(s.mode, s.has_biases, s.bidirectional, wanted, cotangents, s.tensors)
                           .cast<std::vector<OptionalTensor>>();
    for (const OptionalTensor& t : found) gradients.push_back(tensor_or_undefined(t));
  } catch (pybind11::error_already_set& error) {
    error.restore();
    python_error raised;  // the engine carries it over to the thread that called backward
    raised.persist();
    throw raised;
  }
  for (int i = 0; one_step && i < 3; ++i) gradients[i] = lowered(gradients[i]);
  return gradients;
}

// x, h0, c0 and params are arguments of their own, beside `in`, as autograd sees direct ones alone.
// The c_n of cells without one, which is empty, leaves by a side door: compiled autograd refuses a
// node with outputs that cannot be differentiated.
class LayerNode : public torch::autograd::Function<LayerNode> {
  // One value, as each of them takes an allocation or two.
  static constexpr const char* kOptions = "options";
  static int64_t options_of(Cell cell, bool has_biases, bool bidirectional) {
    return static_cast<int64_t>(cell) << 2 | int64_t{has_biases} << 1 | int64_t{bidirectional};
  }

 public:
  static variable_list forward(AutogradContext* ctx, const std::string& mode, const at::Tensor& x,
                               const OptionalTensor& h0, const OptionalTensor& c0,
                               at::TensorList params, const LayerInputs& in, bool has_biases,
                               bool bidirectional, bool recompute, at::Tensor* no_cell_state) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const bool one_step = x.dim() == 2 && !in.batch_sizes;
    auto [y, h_n, c_n, gates, cells] =
        forward_op()(mode, x, in.lengths, in.batch_sizes, in.reset, h0, c0, params, has_biases,
                     bidirectional, /*save=*/true, recompute);
    variable_list saved = {x,
                           tensor_or_undefined(in.lengths),
                           tensor_or_undefined(in.batch_sizes),
                           tensor_or_undefined(in.reset),
                           tensor_or_undefined(h0),
                           tensor_or_undefined(c0),
                           one_step ? h_n : y,
                           gates,
                           cells};
    saved.insert(saved.end(), params.begin(), params.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data[kOptions] = options_of(cell_of(mode), has_biases, bidirectional);
    ctx->set_materialize_grads(false);
    variable_list outputs;
    if (!one_step) outputs.push_back(std::move(y));
    outputs.push_back(std::move(h_n));
    if (mode == "LSTM") {
      outputs.push_back(std::move(c_n));
    } else {
      *no_cell_state = std::move(c_n);
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const auto defined = [](const at::Tensor& t) { return t.defined(); };
    const int64_t options = ctx->saved_data[kOptions].toInt();
    const SavedTensors saved{mode_of(static_cast<Cell>(options >> 2)), (options & 2) != 0,
                             (options & 1) != 0, ctx->get_saved_variables()};
    // One for each of forward's arguments: mode, x, h0, c0, *params, in, has_biases, bidirectional,
    // recompute, no_cell_state.
    variable_list result(saved.params().size() + 9);
    if (std::none_of(cotangents.begin(), cotangents.end(), defined)) return result;
    std::vector<bool> wanted;
    size_t edge = 0;  // absent states have none
    const auto ask = [&](const at::Tensor& t) {
      wanted.push_back(t.defined() && ctx->needs_input_grad(edge++));
    };
    for (const int index : {SavedTensors::kX, SavedTensors::kH0, SavedTensors::kC0}) {
      ask(saved.tensors[index]);
    }
    for (const at::Tensor& param : saved.params()) ask(param);
    variable_list of_outputs(saved.one_step() ? 1 : 0);  // y, h_n, c_n
    of_outputs.insert(of_outputs.end(), cotangents.begin(), cotangents.end());
    of_outputs.resize(3);
    variable_list gradients = everyday(cotangents) ? everyday_gradients(saved, of_outputs, wanted)
                                                   : composed_gradients(saved, of_outputs, wanted);
    std::move(gradients.begin(), gradients.end(), result.begin() + 1);
    return result;
  }
};

// Whether autocast, a torch.func transform or a forward-mode level is on.
bool needs_a_closer_look() {
  return at::autocast::is_autocast_enabled(at::kCPU) || transforms_active() ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// Whether a plain call on the CPU takes x with these weights, and t beside x.
bool suits(const at::Tensor& x, const at::Tensor& w_ih) {
  return x.device().is_cpu() && w_ih.device().is_cpu() && x.scalar_type() == w_ih.scalar_type() &&
         x.size(-1) == w_ih.size(1);
}
bool suits(const OptionalTensor& t, at::IntArrayRef shape, const at::Tensor& x) {
  return !t ||
         (t->sizes() == shape && t->scalar_type() == x.scalar_type() && t->device() == x.device());
}

// torch.jit.trace gives programs for inference, and compares two traces, of which the second is
// made without gradients.
bool records(const LayerInputs& in) {
  const auto requires_grad = [](const at::Tensor& t) { return t.requires_grad(); };
  return at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
         !torch::jit::tracer::isTracing() &&
         (std::any_of(in.params.begin(), in.params.end(), requires_grad) || requires_grad(in.x) ||
          (in.h0 && requires_grad(*in.h0)) || (in.c0 && requires_grad(*in.c0)));
}

// y, which is undefined in the op's form without an axis of steps, h_n and c_n.
std::tuple<at::Tensor, at::Tensor, at::Tensor> run(const std::string& mode, const LayerInputs& in,
                                                   bool has_biases, bool bidirectional,
                                                   bool recompute) {
  at::Tensor y, h_n, c_n;
  const bool one_step = in.x.dim() == 2 && !in.batch_sizes;
  if (records(in)) {
    auto outputs = LayerNode::apply(mode, in.x, in.h0, in.c0, in.params, in, has_biases,
                                    bidirectional, recompute, &c_n);
    auto next = outputs.begin();
    if (!one_step) y = std::move(*next++);
    h_n = std::move(*next++);
    if (next != outputs.end()) c_n = std::move(*next);
  } else {
    at::Tensor gates, cells;
    std::tie(y, h_n, c_n, gates, cells) =
        forward_op()(mode, in.x, in.lengths, in.batch_sizes, in.reset, in.h0, in.c0, in.params,
                     has_biases, bidirectional, /*save=*/false, /*recompute=*/false);
    if (one_step) y.reset();
  }
  return {std::move(y), std::move(h_n), std::move(c_n)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer(
    const std::string& mode, const at::Tensor& x, const OptionalTensor& lengths,
    const OptionalTensor& batch_sizes, const OptionalTensor& reset, const OptionalTensor& h0,
    const OptionalTensor& c0, const std::vector<at::Tensor>& params, bool has_biases,
    bool bidirectional, bool recompute) {
  // The op's form without an axis of steps is cell_step's.
  TORCH_CHECK_VALUE(x.dim() == (batch_sizes ? 2 : 3), "x: expected shape ",
                    batch_sizes ? "(N, input_size)" : "(T, B, input_size)", ", got ", x.sizes());
  const LayerInputs in{x, lengths, batch_sizes, reset, h0, c0, params};
  return run(mode, in, has_biases, bidirectional, recompute);
}

std::optional<std::tuple<at::Tensor, at::Tensor, at::Tensor>> plain_layer(
    const std::string& mode, const at::Tensor& input, const OptionalTensor& h0,
    const OptionalTensor& c0, const std::vector<at::Tensor>& params, bool has_biases,
    bool bidirectional, bool batch_first, bool recompute) {
  const at::Tensor& w_ih = params[0];
  const at::Tensor& w_hh = params[1];
  if (input.dim() != 3 || needs_a_closer_look() || !suits(input, w_ih)) return std::nullopt;
  const at::Tensor x = batch_first ? input.transpose(0, 1) : input;
  const int64_t directions = bidirectional ? 2 : 1;
  const int64_t hidden = w_ih.size(0) / 4;  // of an LSTM, which alone has a c0
  if (x.size(0) == 0 || !suits(h0, {directions, x.size(1), w_hh.size(1)}, x) ||
      !suits(c0, {directions, x.size(1), hidden}, x)) {
    return std::nullopt;
  }
  const OptionalTensor none;
  auto result =
      layer(mode, x, none, none, none, h0, c0, params, has_biases, bidirectional, recompute);
  if (batch_first) std::get<0>(result) = std::get<0>(result).transpose(0, 1);
  return result;
}

std::optional<std::tuple<at::Tensor, at::Tensor>> cell_step(
    const std::string& mode, const at::Tensor& x, const OptionalTensor& h, const OptionalTensor& c,
    const std::vector<at::Tensor>& params, bool has_biases) {
  if (x.dim() != 2 || needs_a_closer_look() || !suits(x, params[0])) return std::nullopt;
  const std::array<int64_t, 2> state = {x.size(0), params[1].size(1)};
  if (!suits(h, state, x) || !suits(c, state, x)) return std::nullopt;
  const OptionalTensor none;
  const LayerInputs in{x, none, none, none, h, c, params};
  auto [y, h_n, c_n] = run(mode, in, has_biases, /*bidirectional=*/false, /*recompute=*/false);
  return std::tuple{std::move(h_n), std::move(c_n)};
}

}  // namespace fusedrnn
