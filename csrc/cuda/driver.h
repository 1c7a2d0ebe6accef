// The layer ops as a CUDA device runs them: allocation, the time loop, the products.
//
// The driver asks a device for a stream, for products and for the kernels, and for nothing else. So
// it is the same program on a GPU (ops_cuda.cpp) and where the kernels are emulated on the host
// (tests/cuda_emulated).
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/sentinel.h"
#include "layer.h"
#include "strategy.h"

namespace fusedrnn {

// ---- what a device gives ------------------------------------------------------------------------

// The stream that the calling thread's work goes to.
CudaStream current_stream();

// out = a b, for matrices of one dtype; out has that dtype, or it is float32 where that one is half
// precision. Sums are float32 or wider, and rounded once; to half precision, where torch's switches
// allow_*_reduced_precision_reduction are on, as it starts, perhaps a few times.
void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

// The most memory for what a part of time is projected to, or its gradients: enough rows for the
// device's products, and no more for a longer sequence.
int64_t part_bytes();

// ---- the ops ------------------------------------------------------------------------------------

struct ForwardResult {
  at::Tensor y, h_n, c_n, gates, cells;
};
// All tensors are on one device but batch_sizes; lengths stand for the nearest in 0..T.
ForwardResult forward_on_device(const Layer& layer, const LayerInputs& in, bool save);

struct BackwardResult {
  at::Tensor dx, dh0, dc0;  // (0) where not wanted
  std::vector<at::Tensor> dparams;
};
BackwardResult backward_on_device(const Layer& layer, const BackwardInputs& in,
                                  const c10::List<bool>& wanted);

// ---- pieces that both share ---------------------------------------------------------------------

// Calls f<E>() for what the layer's values are kept as.
template <class F>
void with_storage(const Layer& layer, F f) {
  switch (layer.dtype) {
    case at::kDouble:
      return f.template operator()<double>();
    case at::kBFloat16:
      return f.template operator()<BFloat16>();
    case at::kHalf:
      return f.template operator()<Half>();
    default:
      return f.template operator()<float>();
  }
}

// The tensor's memory, `at` values in, as a type of storage.h; null for what is undefined.
template <class T>
T* values_of(const at::Tensor& t, int64_t at = 0) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) + at : nullptr;
}
template <class T>
const T* const_values_of(const at::Tensor& t, int64_t at = 0) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) + at : nullptr;
}

// Contiguous, or undefined where absent.
inline at::Tensor dense(const OptionalTensor& t) { return t ? t->contiguous() : at::Tensor(); }

// Steps [begin, end) in time whatever the direction.
struct Steps {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// What two directions walk at a time: as many parts for either, as long ones where steps have
// equally many rows.
struct Parts {
  std::vector<Steps> of[2];     // a direction's
  int64_t rows = 0, steps = 0;  // the most that any has
};

// The order of steps, and which rows each of them has. Steps that no row has are left out.
class Walk {
 public:
  // No part of time has more than `most_steps`.
  Walk(const Layer& layer, const LayerInputs& in, int64_t most_steps);

  int64_t steps() const { return steps_; }
  int64_t rows(int64_t t) const { return row_[t + 1] - row_[t]; }
  int64_t row(int64_t t) const { return row_[t]; }  // of x, that batch row 0 has at step t
  Rows rows_at(int64_t t) const { return {row(t), rows(t)}; }
  int64_t rows(Steps part) const { return row_[part.end] - row_[part.begin]; }
  const int64_t* lengths() const { return const_values_of<int64_t>(lengths_); }

  Step step(int64_t t, bool reverse) const;
  PartOfWalk part(Steps steps, bool reverse) const;
  // The first that a direction walks.
  Step first_step(bool reverse) const { return step(reverse ? steps_ - 1 : 0, reverse); }

  // Parts of so many rows at most (or of one step), in the order in which each of the directions
  // walks, or back-propagation through it.
  Parts parts(int64_t most_rows, int directions, bool back) const;

 private:
  Order order(bool reverse) const;
  std::vector<Steps> cut(int64_t most_rows, bool backwards) const;

  int64_t steps_;
  int64_t batch_;
  int64_t most_steps_;
  std::vector<int64_t> row_;  // (steps + 1)
  at::Tensor lengths_, reset_;
};

// The most steps of a part of time: a kernel for many steps gets their rows as parameters.
inline int64_t most_steps(Strategy strategy) {
  return strategy == Strategy::kPerStep ? std::numeric_limits<int64_t>::max() / 2 : kMostSteps;
}

// How the recurrence of a call runs.
struct Recurrence {
  Strategy strategy;
  int sides = 1;  // directions that a kernel for many steps takes at a time
  // Of the persistent kernels: their form, and how many rows of the batch a launch takes.
  PersistentForm form = {};
  int rows = 0;
};

// What suits a layer, of how many CTAs of a form the device can have at a time.
Recurrence persistent_recurrence(const Layer& layer,
                                 const std::function<int64_t(const PersistentForm&)>& resident);

// Kernels: PersistentForward or PersistentBackward.
template <template <class> class Kernels, class E>
Recurrence recurrence_of(const Layer& layer) {
  const Strategy strategy = strategy_of(layer);
  if constexpr (!std::is_same_v<E, double>) {
    if (strategy == Strategy::kPersistent) {
      return persistent_recurrence(layer, [&](const PersistentForm& form) {
        return Kernels<E>::resident(layer.cell, form);
      });
    }
  }
  return {strategy, strategy == Strategy::kOneCta ? layer.directions : 1};
}

// W_hh for the kernels that keep it: w (a, H, c, H) with zeros up to (a, U, c, U). A matrix that
// is so already is not copied.
at::Tensor kept_weight(Strategy strategy, const at::Tensor& w);

// What CTAs of persistent kernels exchange: memory where x is, (sides, steps, B, words of `blocks`
// values a unit).
at::Tensor exchange_memory(const Layer& layer, const at::Tensor& x, int64_t sides, int64_t steps,
                           int64_t blocks);

// Calls run(exchange) for as many rows of the batch at a time as the device takes.
template <class Part, class F>
void in_launches(const Recurrence& how, const at::Tensor& memory, const SideBySide<Part>& sides,
                 const F& run) {
  const int64_t batch = sides.part[0].part.order.batch;
  int64_t steps = 0;
  Exchange exchange{};
  exchange.form = how.form;
  for (int i = 0; i < sides.count; ++i) {
    steps = std::max(steps, sides.part[i].part.end - sides.part[i].part.begin);
    exchange.words[i] = values_of<uint32_t>(memory, i * memory.stride(0));
  }
  memory.narrow(1, 0, steps).fill_(static_cast<int32_t>(kUnwritten));
  for (int64_t row = 0; row < batch; row += how.rows) {
    exchange.first_row = row;
    exchange.rows = static_cast<int>(std::min<int64_t>(how.rows, batch - row));
    run(exchange);
  }
}

// How many rows of so many bytes are worked on at a time in the products that are parallel over
// time.
inline int64_t rows_of_part(int64_t bytes) { return std::max<int64_t>(1, part_bytes() / bytes); }

// cuDNN's switch, for a layer of float32.
bool recurrence_uses_tf32(const Layer& layer);

// While one lives, products follow cuDNN's switch for TF32 in recurrent layers, as torch.nn's
// layers do, in place of cuBLAS's.
//
// The switch off is a matter of this thread. The switch on is one of the process: a product that
// another thread starts meanwhile may use TF32 as well.
class RecurrentPrecision {
 public:
  explicit RecurrentPrecision(const Layer& layer);
  ~RecurrentPrecision();
  RecurrentPrecision(const RecurrentPrecision&) = delete;
  RecurrentPrecision& operator=(const RecurrentPrecision&) = delete;

 private:
  std::optional<at::NoTF32Guard> off_;
  std::optional<at::Float32Precision> before_;  // cuBLAS's, where it was switched on
};

}  // namespace fusedrnn
