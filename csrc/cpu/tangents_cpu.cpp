// The tangents' op on the CPU.
#include <ATen/autocast_mode.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/run_team.h"
#include "cpu/tangents_direction.h"

namespace fusedrnn {
namespace {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Denormals flushed on all of torch's team, which ATen's products use. On all of it however little
// there is to do: a thread that a product starts would begin with its caller's mode, and keep it.
class FlushDenormalsOfTeam {
 public:
  explicit FlushDenormalsOfTeam(int threads) : flushed_(threads) {
    on_each([](std::optional<FlushDenormals>& one) { one.emplace(); });
  }
  ~FlushDenormalsOfTeam() {
    on_each([](std::optional<FlushDenormals>& one) { one.reset(); });
  }

 private:
  template <class F>
  void on_each(F f) {
    const int threads = static_cast<int>(flushed_.size());
    if (threads == 1) return f(flushed_[0]);
#pragma omp parallel num_threads(threads)
    f(flushed_[omp_get_thread_num()]);
  }
  std::vector<std::optional<FlushDenormals>> flushed_;
};

// Tangents as the op is given them: of x, h0, c0, *params; of dy, dh_n, dc_n.
struct TangentInputs {
  std::vector<OptionalTensor> of_inputs, of_gradients;

  TangentInputs(const Layer& layer, const BackwardInputs& in, const OptionalTensors& inputs,
                const OptionalTensors& gradients)
      : of_inputs(inputs.begin(), inputs.end()), of_gradients(gradients.begin(), gradients.end()) {
    const LayerInputs& of = in.layer;
    TORCH_CHECK_VALUE(of_inputs.size() == of.params.size() + 3, "tangents: expected ",
                      of.params.size() + 3, " values, got ", of_inputs.size());
    TORCH_CHECK_VALUE(of_gradients.size() == 3, "gradient_tangents: expected 3 values, got ",
                      of_gradients.size());
    check("tangents[0] (x)", of_inputs[0], of.x.sizes(), of.x);
    check("tangents[1] (h0)", of_inputs[1], of.h0 ? of.h0->sizes() : at::IntArrayRef(), of.x);
    check("tangents[2] (c0)", of_inputs[2], of.c0 ? of.c0->sizes() : at::IntArrayRef(), of.x);
    for (size_t i = 0; i < of.params.size(); ++i) {
      check("tangents of params", of_inputs[3 + i], of.params[i].sizes(), of.x);
    }
    check("gradient_tangents[0] (dy)", of_gradients[0], layer.y_shape(), of.x);
    check("gradient_tangents[1] (dh_n)", of_gradients[1], layer.state_shape(layer.sizes.output),
          of.x);
    TORCH_CHECK_VALUE(has_cell_state(layer.cell) || !of_gradients[2],
                      "gradient_tangents[2] (dc_n): only the LSTM has a cell state");
    check("gradient_tangents[2] (dc_n)", of_gradients[2], layer.state_shape(layer.sizes.hidden),
          of.x);
  }

 private:
  static void check(const char* name, const OptionalTensor& t, at::IntArrayRef shape,
                    const at::Tensor& x) {
    if (t) check_like(name, *t, shape, x);
  }
};

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                           std::vector<at::Tensor>>;

template <class S>
Results run(const Isa& isa, const Layer& layer, const BackwardInputs& in,
            const TangentInputs& tangents, const c10::List<bool>& mask) {
  const RowOrder order(layer, in.layer);
  const at::TensorList params = in.layer.params;
  const int64_t output = layer.sizes.output;
  const auto each = [](const OptionalTensor& t, auto f) { return t ? f(*t) : at::Tensor(); };
  const auto packed = [&](const at::Tensor& t) { return order.packed(t); };
  const DualTensor x = {packed(in.layer.x), each(tangents.of_inputs[0], packed)};

  // Hooks of saved tensors may give them back in other strides; the kernels' rows are dense.
  const at::Tensor gates = in.gates.contiguous(), cells = in.cells.contiguous();

  const bool goes_back = std::any_of(mask.begin(), mask.end(), [](bool wanted) { return wanted; });

  std::vector<TangentsOfDirection<S>> directions;
  directions.reserve(layer.directions);
  for (int d = 0; d < layer.directions; ++d) {
    const auto state = [&](const at::Tensor& t) { return order.sorted(layer.of_direction(t, d)); };
    const auto saved = [&](const at::Tensor& t, int64_t width) {
      return t.select(1, d).narrow(0, 0, order.rows()).narrow(1, 0, width);
    };
    const auto weight = [&](Param p) -> DualTensor {
      return {layer.param(params, d, p).contiguous(),
              each(tangents.of_inputs[3 + layer.index_of(d, p)],
                   [](const at::Tensor& t) { return t.contiguous(); })};
    };
    DualWeights w = {weight(Param::kWih), weight(Param::kWhh), {}, {}, {}};
    if (layer.has_biases) {
      w.b_ih = weight(Param::kBih).tangent;
      w.b_hh = weight(Param::kBhh).tangent;
    }
    if (layer.sizes.projected) w.w_hr = weight(Param::kWhr);
    directions.emplace_back(
        isa, order, d, w, x,
        DualTensor{each(in.layer.h0, state), each(tangents.of_inputs[1], state)},
        DualTensor{each(in.layer.c0, state), each(tangents.of_inputs[2], state)},
        packed(in.y.narrow(-1, d * output, output)),
        keeps_gates(layer.cell) ? saved(gates, gates.size(2)) : at::Tensor(),
        has_cell_state(layer.cell) ? saved(cells, layer.sizes.hidden) : at::Tensor(), goes_back);
    directions.back().forward();
  }

  const auto none = [&] { return at::empty({0}, in.layer.x.options()); };
  const bool lstm = has_cell_state(layer.cell);
  // One tensor of all directions.
  const auto stacked = [&](auto of) {
    std::vector<at::Tensor> each_one;
    for (const TangentsOfDirection<S>& direction : directions) each_one.push_back(of(direction));
    return at::stack(each_one);
  };
  std::vector<at::Tensor> ys;
  for (const TangentsOfDirection<S>& direction : directions) ys.push_back(direction.y_tangent());
  const at::Tensor y = order.unpacked(ys.size() == 1 ? ys[0] : at::cat(ys, 1));
  const at::Tensor h_n = stacked([](const auto& one) { return one.h_n_tangent(); });
  const at::Tensor c_n = lstm ? stacked([](const auto& one) { return one.c_n_tangent(); }) : none();
  std::vector<at::Tensor> dparams;
  for (size_t i = 0; i < params.size(); ++i) dparams.push_back(none());
  if (!goes_back) {
    return {y, h_n, c_n, none(), none(), none(), std::move(dparams)};
  }

  at::Tensor dx = mask[0] ? zero_tensor(x.value.sizes(), x.value.options()) : none();
  for (int d = 0; d < layer.directions; ++d) {
    TangentsOfDirection<S>& direction = directions[d];
    const auto rows = [&](const at::Tensor& t) { return packed(t.narrow(-1, d * output, output)); };
    const auto state = [&](const at::Tensor& t) { return order.sorted(layer.of_direction(t, d)); };
    const std::vector<OptionalTensor>& g = tangents.of_gradients;
    direction.backward({each(in.dy, rows), each(g[0], rows)},
                       {each(in.dh_n, state), each(g[1], state)},
                       {lstm ? each(in.dc_n, state) : at::Tensor(), each(g[2], state)});
    if (mask[0]) direction.add_dx(dx);
    const auto put = [&](Param p, auto of) {
      const int i = layer.index_of(d, p);
      if (mask[3 + i]) dparams[i] = of(direction);
    };
    put(Param::kWih, [](const auto& one) { return one.dw_ih(); });
    put(Param::kWhh, [](const auto& one) { return one.dw_hh(); });
    if (layer.has_biases) {
      put(Param::kBih, [](const auto& one) { return one.db_ih(); });
      put(Param::kBhh, [](const auto& one) { return one.db_hh(); });
    }
    if (layer.sizes.projected) {
      put(Param::kWhr, [](const auto& one) { return one.dw_hr(); });
    }
  }
  return {y,
          h_n,
          c_n,
          mask[0] ? order.unpacked(dx) : none(),
          mask[1] ? stacked([](const auto& one) { return one.dh0(); }) : none(),
          mask[2] ? stacked([](const auto& one) { return one.dc0(); }) : none(),
          std::move(dparams)};
}

Results layer_tangents(const std::string& mode, const OptionalTensor& dy,
                       const OptionalTensor& dh_n, const OptionalTensor& dc_n, const at::Tensor& x,
                       const OptionalTensor& lengths, const OptionalTensor& batch_sizes,
                       const OptionalTensor& reset, const OptionalTensor& h0,
                       const OptionalTensor& c0, at::TensorList params, const at::Tensor& y,
                       const at::Tensor& gates, const at::Tensor& cells,
                       const OptionalTensors& tangents, const OptionalTensors& gradient_tangents,
                       bool has_biases, bool bidirectional, c10::List<bool> output_mask) {
  const LayerInputs in{x, lengths, batch_sizes, reset, h0, c0, params};
  const Layer layer(mode, in, has_biases, bidirectional);
  TORCH_CHECK_VALUE(!layer.one_step, "x: expected shape (T, B, input_size), got ", x.sizes());
  TORCH_CHECK_TYPE(layer.dtype == layer.accumulate, "x: expected a float32 or float64 tensor, got ",
                   layer.dtype);
  const BackwardInputs saved{in, dy, dh_n, dc_n, y, gates, cells};
  check_backward(layer, saved, output_mask, /*may_recompute=*/false);
  const TangentInputs given(layer, saved, tangents, gradient_tangents);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const FlushDenormalsOfTeam flush(at::get_num_threads());
  const Isa& isa = current_isa();
  return layer.dtype == at::kDouble ? run<double>(isa, layer, saved, given, output_mask)
                                    : run<float>(isa, layer, saved, given, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { m.impl("layer_tangents", layer_tangents); }

}  // namespace fusedrnn
