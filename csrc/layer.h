// What one call of the layer ops is about, checked: shared by the CPU and the CUDA half.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "recurrence.h"

namespace fusedrnn {

using OptionalTensor = std::optional<at::Tensor>;

// By the name that the ops use; throws c10::ValueError for another.
Cell cell_of(const std::string& mode);
const std::string& mode_of(Cell cell);

// The tensors of a layer call, as the op's schema has them (ops.cpp).
struct LayerInputs {
  const at::Tensor& x;
  const OptionalTensor& lengths;
  const OptionalTensor& batch_sizes;
  const OptionalTensor& reset;
  const OptionalTensor& h0;
  const OptionalTensor& c0;
  at::TensorList params;
};

// The C++ types of the ops that everyday autograd calls.
using LayerForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const std::string& mode, const at::Tensor& x, const OptionalTensor& lengths,
    const OptionalTensor& batch_sizes, const OptionalTensor& reset, const OptionalTensor& h0,
    const OptionalTensor& c0, at::TensorList params, bool has_biases, bool bidirectional, bool save,
    bool recompute);
using LayerBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>(
    const std::string& mode, const OptionalTensor& dy, const OptionalTensor& dh_n,
    const OptionalTensor& dc_n, const at::Tensor& x, const OptionalTensor& lengths,
    const OptionalTensor& batch_sizes, const OptionalTensor& reset, const OptionalTensor& h0,
    const OptionalTensor& c0, at::TensorList params, const at::Tensor& y, const at::Tensor& gates,
    const at::Tensor& cells, bool has_biases, bool bidirectional, c10::List<bool> output_mask);

// Checks the shape, and the dtype and device against x's; throws c10::ValueError or c10::TypeError
// that name the argument.
void check_like(const char* name, const at::Tensor& t, at::IntArrayRef shape, const at::Tensor& x);

// A direction's parameters, in torch.nn's order, from which biases or a projection may be missing.
enum class Param { kWih, kWhh, kBih, kBhh, kWhr };

// Sizes and kinds of a call.
struct Layer {
  Cell cell;
  Sizes sizes;
  int directions;
  int params_per_direction;
  bool has_biases;
  bool packed;    // x is (N, I) with batch_sizes
  bool one_step;  // x is (B, I), states (B, .): no axes of steps and directions
  int64_t steps;  // T
  int64_t batch;  // B
  int64_t rows;   // rows of x: T * B, or N
  at::ScalarType dtype;
  at::ScalarType accumulate;  // of the arithmetic and of the cell state

  // Checks every shape, dtype and device; throws c10::Error, c10::ValueError or c10::TypeError
  // that name the argument.
  Layer(const std::string& mode, const LayerInputs& in, bool has_biases, bool bidirectional);

  // Where a direction's parameter stands in `params`.
  int index_of(int direction, Param param) const {
    const int index = param == Param::kWhr && !has_biases ? 2 : static_cast<int>(param);
    return direction * params_per_direction + index;
  }
  const at::Tensor& param(at::TensorList params, int direction, Param param) const {
    return params[index_of(direction, param)];
  }
  using Shape = c10::SmallVector<int64_t, 3>;
  Shape y_shape() const;
  // Of h0, h_n and their gradients with units = P, of c0 and c_n with H.
  Shape state_shape(int64_t units) const;
  // One direction's rows of those.
  at::Tensor of_direction(const at::Tensor& states, int direction) const {
    return one_step ? states : states.select(0, direction);
  }
  // From one direction to the next in a row of the saved gates, whose blocks are hidden_padded
  // apart.
  int64_t saved_stride() const;
  // Of the cell states kept for backward: after all steps, or between segments of segment_steps
  // where backward is to recompute the others, then with a row for each of the batch's.
  Shape cells_shape(bool recompute) const;

 private:
  // The constructor's parts.
  void read_params(const at::Tensor& x, at::TensorList params);
  void read_batch_sizes(const LayerInputs& in);
  void check_options(const LayerInputs& in) const;
};

// Checks the values of lengths (B) that lie on the CPU: 0..T.
void check_lengths(const Layer& layer, const at::Tensor& lengths);

// What the forward op left behind, and the gradients that came in.
struct BackwardInputs {
  const LayerInputs& layer;
  const OptionalTensor &dy, &dh_n, &dc_n;
  const at::Tensor &y, &gates, &cells;
  // Whether gates, and cells within segments of time, were not kept.
  bool recomputes(const Layer& layer) const {
    return keeps_gates(layer.cell) && gates.dim() == 1 && gates.numel() == 0;
  }
};

// Checks their shapes, dtypes and devices, and the mask of what is wanted, as Layer does.
void check_backward(const Layer& layer, const BackwardInputs& in, const c10::List<bool>& mask,
                    bool may_recompute);

// Where each row of each step lies, see Schedule; and the resets per direction in packed order.
struct ScheduleStorage {
  c10::SmallVector<int64_t, 8> rows, row0;  // a short call allocates nothing
  std::vector<int64_t> io_row, order;
  std::vector<uint8_t> reset[2];
  bool has_empty_rows = false;  // some length is 0
  bool padded = false;          // some (step, row) pair of x is padding
  Schedule view;

  ScheduleStorage(const Layer& layer, const LayerInputs& in);
  ScheduleStorage(const ScheduleStorage&) = delete;

  const uint8_t* reset_of(int direction) const {
    return reset[direction].empty() ? nullptr : reset[direction].data();
  }
};

}  // namespace fusedrnn
