// Where the tangents' op finds its rows: ATen's tensors in the order in which steps are walked.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "cpu/tensors_cpu.h"
#include "layer.h"
#include "tangents.h"

namespace fusedrnn {

// A tangent that is not given is zero, and undefined.
struct DualTensor {
  at::Tensor value, tangent;
};

// Where the rows of every step lie. "Packed" are tensors (N, .), "sorted" states (B, .), in the
// schedule's order.
class RowOrder {
 public:
  RowOrder(const Layer& layer, const LayerInputs& in)
      : layer(layer), storage_(layer, in), schedule(storage_.view) {
    if (in.lengths) {  // rows of length 0 alone leave io_row empty
      io_row_ = at::tensor(storage_.io_row, at::kLong);
      order_ = at::tensor(storage_.order, at::kLong);
    }
  }

  int64_t rows() const { return schedule.row0[schedule.steps]; }  // N
  const uint8_t* reset_of(int direction) const { return storage_.reset_of(direction); }

  // (T, B, F) or (N, F) to packed, and back; padding is zero.
  at::Tensor packed(const at::Tensor& t) const {
    const at::Tensor flat = t.reshape({layer.rows, t.size(-1)});
    return io_row_.defined() ? flat.index_select(0, io_row_) : flat.contiguous();
  }
  at::Tensor unpacked(const at::Tensor& t) const {
    at::Tensor flat = t;
    if (io_row_.defined()) {
      flat = zero_tensor({layer.rows, t.size(1)}, t.options()).index_copy_(0, io_row_, t);
    }
    if (layer.packed) return flat;
    return flat.reshape({layer.steps, layer.batch, t.size(1)});
  }
  // (B, F) of one direction to sorted, and back.
  at::Tensor sorted(const at::Tensor& t) const {
    return order_.defined() ? t.index_select(0, order_) : t.contiguous();
  }
  at::Tensor unsorted(const at::Tensor& t) const {
    return order_.defined() ? at::empty_like(t).index_copy_(0, order_, t) : t;
  }

  const Layer& layer;

 private:
  ScheduleStorage storage_;
  at::Tensor io_row_, order_;

 public:
  const Schedule& schedule;
};

template <class S>
const S* read(const at::Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <class S>
StridedRows<S> rows_of(const at::Tensor& t) {
  if (!t.defined()) return {nullptr, 0};
  return {data_of<S>(t), t.stride(0)};
}
template <class S>
StridedRows<const S> const_rows_of(const at::Tensor& t) {
  if (!t.defined()) return {nullptr, 0};
  return {read<S>(t), t.stride(0)};
}

}  // namespace fusedrnn
