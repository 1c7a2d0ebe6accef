#include "layer.h"

#include <algorithm>
#include <numeric>

namespace fusedrnn {

const std::string& mode_of(Cell cell) {
  static const std::string modes[kCells] = {"LSTM", "GRU", "RNN_TANH", "RNN_RELU"};
  return modes[static_cast<int>(cell)];
}

Cell cell_of(const std::string& mode) {
  for (int i = 0; i < kCells; ++i) {
    if (mode == mode_of(static_cast<Cell>(i))) return static_cast<Cell>(i);
  }
  TORCH_CHECK_VALUE(false, "mode: expected 'LSTM', 'GRU', 'RNN_TANH' or 'RNN_RELU', got '", mode,
                    "'");
}

void check_like(const char* name, const at::Tensor& t, at::IntArrayRef shape, const at::Tensor& x) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, ": expected shape ", shape, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), name, ": expected dtype ", x.scalar_type(),
                   " like x, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == x.device(), name, ": expected device ", x.device(),
                    " like x, got ", t.device());
}

Layer::Layer(const std::string& mode, const LayerInputs& in, bool has_biases, bool bidirectional)
    : cell(cell_of(mode)),
      directions(bidirectional ? 2 : 1),
      has_biases(has_biases),
      packed(in.batch_sizes.has_value()),
      one_step(!packed && in.x.dim() == 2),
      dtype(in.x.scalar_type()) {
  const at::Tensor& x = in.x;
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      "x: expected a float32, float64, bfloat16 or float16 tensor, got ", dtype);
  accumulate = dtype == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(x.dim() == (packed || one_step ? 2 : 3), "x: expected shape ",
                    packed ? "(N, input_size)" : "(T, B, input_size) or (B, input_size)", ", got ",
                    x.sizes());
  TORCH_CHECK_VALUE(!one_step || (!bidirectional && !in.lengths && !in.reset),
                    "x: expected shape (T, B, input_size) with ",
                    bidirectional ? "two directions"
                    : in.lengths  ? "lengths"
                                  : "reset",
                    ", got ", x.sizes());
  read_params(x, in.params);
  if (packed) {
    read_batch_sizes(in);
  } else {
    steps = one_step ? 1 : x.size(0);
    batch = x.size(-2);
    rows = steps * batch;
    TORCH_CHECK_VALUE(steps > 0, "x: expected a sequence length larger than 0, got shape ",
                      x.sizes());
  }
  check_options(in);
}

void Layer::read_params(const at::Tensor& x, at::TensorList params) {
  const int biases = has_biases ? 2 : 0;
  const int64_t count = static_cast<int64_t>(params.size());
  params_per_direction = static_cast<int>(count / directions);
  TORCH_CHECK_VALUE(count % directions == 0 &&
                        (params_per_direction == 2 + biases || params_per_direction == 3 + biases),
                    "params: expected ", 2 + biases, " or ", 3 + biases, " tensors for each of ",
                    directions, " directions, got ", count);
  sizes.projected = params_per_direction == 3 + biases;
  TORCH_CHECK_VALUE(!sizes.projected || cell == Cell::kLstm,
                    "params: only the LSTM has a projection");
  const at::Tensor& w_ih = params[0];
  const at::Tensor& w_hh = params[1];
  const int gates = gate_blocks(cell);
  TORCH_CHECK_VALUE(w_ih.dim() == 2 && w_ih.size(0) > 0 && w_ih.size(0) % gates == 0,
                    "params[0] (w_ih): expected shape (", gates,
                    " * hidden_size, input_size), got ", w_ih.sizes());
  TORCH_CHECK_VALUE(w_hh.dim() == 2, "params[1] (w_hh): expected 2 dimensions, got ", w_hh.dim());
  sizes.input = x.size(-1);
  sizes.hidden = w_ih.size(0) / gates;
  sizes.output = sizes.projected ? w_hh.size(1) : sizes.hidden;
  TORCH_CHECK_VALUE(sizes.output > 0, "params[1] (w_hh): expected shape (", gates,
                    " * hidden_size, proj_size) with proj_size > 0, got ", w_hh.sizes());
  for (int d = 0; d < directions; ++d) {
    const int64_t rows_of_gates = gates * sizes.hidden;
    check_like("w_ih", param(params, d, Param::kWih), {rows_of_gates, sizes.input}, x);
    check_like("w_hh", param(params, d, Param::kWhh), {rows_of_gates, sizes.output}, x);
    if (has_biases) {
      check_like("b_ih", param(params, d, Param::kBih), {rows_of_gates}, x);
      check_like("b_hh", param(params, d, Param::kBhh), {rows_of_gates}, x);
    }
    if (sizes.projected) {
      check_like("w_hr", param(params, d, Param::kWhr), {sizes.output, sizes.hidden}, x);
    }
  }
}

void Layer::read_batch_sizes(const LayerInputs& in) {
  const at::Tensor& b = *in.batch_sizes;
  TORCH_CHECK_VALUE(
      b.dim() == 1 && b.size(0) > 0 && b.scalar_type() == at::kLong && b.device().is_cpu(),
      "batch_sizes: expected a non-empty int64 CPU tensor of shape (T,), got ", b.scalar_type(),
      " ", b.sizes(), " on ", b.device());
  TORCH_CHECK_VALUE(!in.lengths && !in.reset, in.lengths ? "lengths" : "reset",
                    ": not accepted together with batch_sizes");
  steps = b.size(0);
  const at::Tensor dense = b.contiguous();
  const int64_t* rows_of_step = dense.const_data_ptr<int64_t>();
  batch = rows_of_step[0];
  rows = in.x.size(0);
  int64_t sum = 0;
  for (int64_t t = 0; t < steps; ++t) {
    TORCH_CHECK_VALUE(rows_of_step[t] >= 0 && (t == 0 || rows_of_step[t] <= rows_of_step[t - 1]),
                      "batch_sizes: expected non-negative, non-increasing values, got ",
                      rows_of_step[t], " at step ", t);
    sum += rows_of_step[t];
  }
  TORCH_CHECK_VALUE(sum == rows, "batch_sizes: expected a sum of ", rows,
                    " like the rows of x, got ", sum);
}

void Layer::check_options(const LayerInputs& in) const {
  const at::Tensor& x = in.x;
  if (in.lengths) {
    TORCH_CHECK_TYPE(in.lengths->scalar_type() == at::kLong, "lengths: expected dtype int64, got ",
                     in.lengths->scalar_type());
    TORCH_CHECK_VALUE(in.lengths->sizes() == at::IntArrayRef({batch}), "lengths: expected shape [",
                      batch, "], got ", in.lengths->sizes());
  }
  if (in.reset) {
    TORCH_CHECK_TYPE(in.reset->scalar_type() == at::kBool, "reset: expected dtype bool, got ",
                     in.reset->scalar_type());
    TORCH_CHECK_VALUE(in.reset->sizes() == at::IntArrayRef({steps, batch}),
                      "reset: expected shape [", steps, ", ", batch, "], got ", in.reset->sizes());
  }
  if (in.h0) check_like("h0", *in.h0, state_shape(sizes.output), x);
  if (in.c0) {
    TORCH_CHECK_VALUE(has_cell_state(cell), "c0: only the LSTM has a cell state");
    check_like("c0", *in.c0, state_shape(sizes.hidden), x);
  }
}

Layer::Shape Layer::y_shape() const {
  const int64_t width = directions * sizes.output;
  if (packed || one_step) return {rows, width};
  return {steps, batch, width};
}

Layer::Shape Layer::state_shape(int64_t units) const {
  if (one_step) return {batch, units};
  return {directions, batch, units};
}

int64_t Layer::saved_stride() const {
  const int64_t width = saved_blocks(cell) * sizes.hidden_padded();
  switch (c10::elementSize(dtype)) {
    case 8:
      return row_stride<double>(width);
    case 4:
      return row_stride<float>(width);
    default:
      return row_stride<uint16_t>(width);
  }
}

Layer::Shape Layer::cells_shape(bool recompute) const {
  const int64_t each = segment_steps(batch), segments = (steps + each - 1) / each;
  return {recompute ? (segments - 1) * batch : rows, directions, sizes.hidden_padded()};
}

void check_lengths(const Layer& layer, const at::Tensor& lengths) {
  const at::Tensor dense = lengths.contiguous();
  const int64_t* length = dense.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < layer.batch; ++b) {
    TORCH_CHECK_VALUE(length[b] >= 0 && length[b] <= layer.steps, "lengths: expected values in 0..",
                      layer.steps, ", got ", length[b], " at row ", b);
  }
}

void check_backward(const Layer& layer, const BackwardInputs& in, const c10::List<bool>& mask,
                    bool may_recompute) {
  const at::Tensor& x = in.layer.x;
  const auto check = [&](const char* name, const at::Tensor& t, at::IntArrayRef shape,
                         at::ScalarType dtype, const char* hint) {
    TORCH_CHECK_VALUE(t.sizes() == shape, name, ": expected shape ", shape, ", got ", t.sizes(),
                      hint);
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": expected dtype ", dtype, ", got ",
                     t.scalar_type());
    TORCH_CHECK_VALUE(t.device() == x.device(), name, ": expected device ", x.device(),
                      " like x, got ", t.device());
  };
  const auto like_x = [&](const char* name, const OptionalTensor& t, at::IntArrayRef shape) {
    if (t) check(name, *t, shape, layer.dtype, "");
  };
  const bool anew = may_recompute && in.recomputes(layer);
  const char* saved = may_recompute ? " (was forward called with save=True?)"
                                    : " (was forward called with save=True, recompute=False?)";
  like_x("dy", in.dy, layer.y_shape());
  like_x("y", in.y, layer.y_shape());
  like_x("dh_n", in.dh_n, layer.state_shape(layer.sizes.output));
  if (has_cell_state(layer.cell)) {
    like_x("dc_n", in.dc_n, layer.state_shape(layer.sizes.hidden));
    check("cells", in.cells, layer.cells_shape(anew), layer.accumulate, saved);
  } else {
    TORCH_CHECK_VALUE(!in.dc_n || in.dc_n->numel() == 0, "dc_n: only the LSTM has a cell state");
  }
  if (keeps_gates(layer.cell) && !anew) {
    check("gates", in.gates, {layer.rows, layer.directions, layer.saved_stride()}, layer.dtype,
          saved);
  }
  TORCH_CHECK_VALUE(mask.size() == in.layer.params.size() + 3, "output_mask: expected ",
                    in.layer.params.size() + 3, " values, got ", mask.size());
  TORCH_CHECK_VALUE(!mask[1] || in.layer.h0, "output_mask[1]: h0 is absent and has no gradient");
  TORCH_CHECK_VALUE(!mask[2] || in.layer.c0, "output_mask[2]: c0 is absent and has no gradient");
}

ScheduleStorage::ScheduleStorage(const Layer& layer, const LayerInputs& in) {
  const int64_t steps = layer.steps, batch = layer.batch;
  if (in.batch_sizes) {
    const at::Tensor b = in.batch_sizes->contiguous();
    rows.assign(b.const_data_ptr<int64_t>(), b.const_data_ptr<int64_t>() + steps);
  } else if (in.lengths) {
    const at::Tensor l = in.lengths->to(at::kCPU).contiguous();
    check_lengths(layer, l);
    const int64_t* length = l.const_data_ptr<int64_t>();
    order.resize(batch);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    rows.assign(steps, 0);
    for (int64_t b = 0; b < batch; ++b) {
      if (length[b] > 0) ++rows[length[b] - 1];
    }
    for (int64_t t = steps - 1; t > 0; --t) rows[t - 1] += rows[t];
  } else {
    rows.assign(steps, batch);
  }
  // Steps that no row has are not walked at all.
  while (!rows.empty() && rows.back() == 0) rows.pop_back();
  const int64_t walked = static_cast<int64_t>(rows.size());
  row0.resize(walked + 1);
  for (int64_t t = 0; t < walked; ++t) row0[t + 1] = row0[t] + rows[t];
  has_empty_rows = batch > 0 && (walked == 0 || rows[0] < batch);
  padded = row0[walked] < layer.rows;

  if (in.lengths) {
    io_row.resize(row0[walked]);
    for (int64_t t = 0; t < walked; ++t) {
      for (int64_t b = 0; b < rows[t]; ++b) io_row[row0[t] + b] = t * batch + order[b];
    }
  }
  if (in.reset) {
    const at::Tensor mask = in.reset->to(at::kCPU).contiguous();
    const bool* flags = mask.const_data_ptr<bool>();
    for (int d = 0; d < layer.directions; ++d) {
      reset[d].resize(row0[walked]);
      for (int64_t t = 0; t < walked; ++t) {
        for (int64_t b = 0; b < rows[t]; ++b) {
          // Walking backwards, the segment's last step is the one before a reset.
          const int64_t at = d == 0 ? t : t + 1;
          const bool inside = at < walked && b < rows[at];
          const int64_t column = order.empty() ? b : order[b];
          reset[d][row0[t] + b] = inside && flags[at * batch + column];
        }
      }
    }
  }
  view = {walked,
          batch,
          rows.data(),
          row0.data(),
          io_row.empty() ? nullptr : io_row.data(),
          order.empty() ? nullptr : order.data(),
          nullptr};
}

}  // namespace fusedrnn
