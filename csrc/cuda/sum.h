// What back-propagation adds up over parts of time: gradients of weights and biases.
#pragma once

#include "cuda/driver.h"

namespace fusedrnn {

// A sum over parts of time, unrounded; undefined where it is not wanted.
class Sum {
 public:
  Sum() = default;
  Sum(at::IntArrayRef shape, const at::TensorOptions& options, bool in_parts)
      : total_(at::empty(shape, options)), part_(in_parts ? at::empty(shape, options) : total_) {}

  bool wanted() const { return total_.defined(); }
  void add_product(const at::Tensor& a, const at::Tensor& b) {
    multiply(next(), a, b);
    add();
  }
  void add_rows(const at::Tensor& rows) {
    at::sum_out(next(), rows, at::IntArrayRef{0}, false, total_.scalar_type());
    add();
  }
  const at::Tensor& total() {
    if (empty_) total_.zero_();
    return total_;
  }

 private:
  at::Tensor& next() { return empty_ ? total_ : part_; }
  void add() {
    if (!empty_) total_.add_(part_);
    empty_ = false;
  }

  at::Tensor total_, part_;
  bool empty_ = true;
};

}  // namespace fusedrnn
