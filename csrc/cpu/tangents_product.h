// The products of the tangents' steps on the CPU.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/tangents_rows.h"

namespace fusedrnn {

// So many multiplications are worth a second thread.
inline constexpr int64_t kProductsOfAThread = int64_t{128} << 10;

// A weight packed for the products of steps, which are our own: of few rows ATen's pack it at every
// step, and of less than four they add up all products one after another, with a larger error.
template <class S>
class StepProduct {
 public:
  StepProduct() = default;
  // Of w (k, columns), or of its transpose.
  StepProduct(const Isa& isa, const at::Tensor& w, bool transposed)
      : kernels_(&isa.table<S>()),
        k_(w.size(transposed ? 1 : 0)),
        columns_(w.size(transposed ? 0 : 1)),
        width_(kTangentVectors * isa.vector_bytes / int64_t{sizeof(S)}),
        panels_((columns_ + width_ - 1) / width_),
        packed_(empty_tensor({panels_ * width_ * k_}, w.options())) {
    kernels_->tangents_pack(data_of<S>(packed_), read<S>(w), w.size(0), w.size(1), transposed);
  }
  explicit operator bool() const { return packed_.defined(); }

  // The first rows of out become those of a times the weight, or that is added to them.
  void operator()(int64_t rows, StridedRows<const S> a, StridedRows<S> out, bool add) const {
    const int64_t panel = std::max<int64_t>(1, rows * width_ * k_);
    at::parallel_for(0, panels_, 1 + kProductsOfAThread / panel, [&](int64_t begin, int64_t end) {
      kernels_->tangents_product({rows, k_, columns_, begin, end, a, read<S>(packed_), out, add});
    });
  }

 private:
  const KernelTable<S>* kernels_ = nullptr;
  int64_t k_ = 0, columns_ = 0, width_ = 0, panels_ = 0;
  at::Tensor packed_;
};

// Of a weight and of its tangent, where it has one.
template <class S>
struct StepProducts {
  StepProduct<S> value, tangent;

  StepProducts(const Isa& isa, const DualTensor& w, bool transposed)
      : value(isa, w.value, transposed) {
    if (w.tangent.defined()) tangent = StepProduct<S>(isa, w.tangent, transposed);
  }
  // Of n rows of values and as many of tangents, which lie behind them.
  void operator()(int64_t n, StridedRows<const S> a, StridedRows<S> out) const {
    value(2 * n, a, out, false);
    if (tangent) tangent(n, a, {out[n], out.stride}, true);
  }
};

}  // namespace fusedrnn
