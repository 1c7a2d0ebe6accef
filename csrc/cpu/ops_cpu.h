// Pieces that the forward and the backward op share on the CPU.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/distance.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/plan.h"
#include "cpu/run_team.h"
#include "cpu/scratch.h"
#include "cpu/walk.h"
#include "layer.h"

namespace fusedrnn {

// Whether products read bfloat16 as it is, the state rounded to it at every step, as torch.nn does;
// else a layer is one of float32 but for what it reads and writes. Not before a ReLU: a sum near
// zero, rounded to the other side, changes a gradient altogether.
inline bool is_narrow(const Layer& layer) {
  return layer.dtype == at::kBFloat16 && layer.cell != Cell::kRnnRelu &&
         (current_isa().quick_bf16 ||
          !worth_widening(layer.cell, layer.sizes, layer.batch, layer.rows));
}

// Calls f<S, E>() for the arithmetic of the layer and what its values are kept in (recurrence.h).
template <class F>
void with_types(const Layer& layer, F f) {
  if (layer.accumulate == at::kDouble) {
    f.template operator()<double, double>();
  } else if (is_narrow(layer)) {
    f.template operator()<float, uint16_t>();
  } else {
    f.template operator()<float, float>();
  }
}

// at::empty on the CPU, past the dispatcher: a short call makes five tensors.
inline at::Tensor plain_empty(at::IntArrayRef shape, const at::TensorOptions& options) {
  return at::detail::empty_cpu(shape, c10::typeMetaToScalarType(options.dtype()));
}

// bfloat16 is uint16_t to the kernels.
template <class T>
inline constexpr at::ScalarType kDtype = at::CppTypeToScalarType<T>::value;
template <>
inline constexpr at::ScalarType kDtype<uint16_t> = at::kBFloat16;

// at::empty, its memory from the pool where it is large; resizable like any other.
inline at::Tensor empty_tensor(at::IntArrayRef shape, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(shape) * options.dtype().itemsize();
  if (bytes < Block::kLeastPooled) return plain_empty(shape, options);
  auto block = std::make_unique<Block>(bytes);
  void* data = block->data();
  const auto give_back = [](void* context) { delete static_cast<Block*>(context); };
  return at::for_blob(data, shape)
      .context(block.release(), give_back)
      .options(options)
      .resizeable_storage()
      .allocator(c10::GetCPUAllocator())
      .make_tensor();
}

// So many values are converted before a second thread pays.
inline constexpr int64_t kValuesToConvert = int64_t{64} << 10;

// t in another dtype. Short calls feel even a conversion that changes nothing, and the dispatcher's
// way to bfloat16 and back.
inline at::Tensor as_dtype(const at::Tensor& t, at::ScalarType dtype) {
  if (t.scalar_type() == dtype) return t;
  const bool narrows = t.scalar_type() == at::kFloat && dtype == at::kBFloat16;
  const bool widens = t.scalar_type() == at::kBFloat16 && dtype == at::kFloat;
  if (!t.is_contiguous() || !(narrows || (widens && t.numel() <= 1024))) return t.to(dtype);
  at::Tensor result = empty_tensor(t.sizes(), t.options().dtype(dtype));
  if (widens) {
    const auto* from = static_cast<const c10::BFloat16*>(t.const_data_ptr());
    std::copy(from, from + t.numel(), static_cast<float*>(result.mutable_data_ptr()));
    return result;
  }
  const auto* from = static_cast<const float*>(t.const_data_ptr());
  auto* to = static_cast<uint16_t*>(result.mutable_data_ptr());
  at::parallel_for(0, t.numel(), kValuesToConvert, [&](int64_t begin, int64_t end) {
    current_isa().bf16.round(from + begin, to + begin, end - begin);
  });
  return result;
}

inline at::Tensor zero_tensor(at::IntArrayRef shape, const at::TensorOptions& options) {
  return empty_tensor(shape, options).zero_();
}

// So many bytes are zeroed before a second thread pays.
inline constexpr int64_t kPaddingBytes = int64_t{256} << 10;

// Writes zeros to the rows of t, (T, B, .) like x, that are padding.
inline void zero_padding(const at::Tensor& t, const Layer& layer, const Schedule& schedule) {
  const int64_t batch = layer.batch;
  const size_t bytes = t.numel() / layer.rows * t.element_size();
  char* data = static_cast<char*>(t.mutable_data_ptr());
  at::parallel_for(0, layer.steps, 1 + kPaddingBytes / std::max<size_t>(1, bytes * batch),
                   [&](int64_t from, int64_t to) {
                     for (int64_t step = from; step < to; ++step) {
                       for (int64_t b = step < schedule.steps ? schedule.rows[step] : 0; b < batch;
                            ++b) {
                         std::memset(data + (step * batch + schedule.order[b]) * bytes, 0, bytes);
                       }
                     }
                   });
}

template <class T>
T* data_of(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The tensor as contiguous values of type T: its own, which it must outlive, or converted ones.
template <class T>
class Values {
 public:
  Values() = default;
  explicit Values(const at::Tensor& t) {
    const bool as_it_is = t.scalar_type() == kDtype<T> && t.is_contiguous();
    if (!as_it_is) converted_ = as_dtype(t, kDtype<T>).contiguous();
    data_ = static_cast<const T*>((as_it_is ? t : converted_).const_data_ptr());
  }
  explicit Values(const OptionalTensor& t) {
    if (t) *this = Values(*t);
  }
  const T* data() const { return data_; }

 private:
  at::Tensor converted_;
  const T* data_ = nullptr;
};

// A weight in words: bfloat16 as it lies, a row of an odd number of values padded.
template <class E>
class Matrix {
 public:
  Matrix() = default;
  explicit Matrix(const at::Tensor& t) {
    const bool whole_words = t.size(1) * sizeof(E) % sizeof(Word<E>) == 0;
    if (!whole_words) padded_ = at::constant_pad_nd(t, {0, 1});
    values_ = Values<E>(whole_words ? t : padded_);
  }
  const Word<E>* data() const { return reinterpret_cast<const Word<E>*>(values_.data()); }

 private:
  at::Tensor padded_;
  Values<E> values_;
};

// One direction's parameters: weights as E, biases, where asked for, as S.
template <class S, class E>
struct WeightValues {
  Matrix<E> w_ih, w_hh, w_hr;
  Values<E> b_ih, b_hh;

  WeightValues() = default;
  WeightValues(const Layer& layer, at::TensorList params, int d, bool biases)
      : w_ih(layer.param(params, d, 0)), w_hh(layer.param(params, d, 1)) {
    if (layer.has_biases && biases) {
      b_ih = Values<E>(layer.param(params, d, 2));
      b_hh = Values<E>(layer.param(params, d, 3));
    }
    if (layer.sizes.projected) w_hr = Matrix<E>(layer.param(params, d, layer.w_hr_index()));
  }

  Weights<S, Word<E>> view() const {
    Weights<S, Word<E>> view{w_ih.data(), w_hh.data(), nullptr, nullptr, w_hr.data()};
    if constexpr (std::is_same_v<S, E>) {
      view.b_ih = b_ih.data();
      view.b_hh = b_hh.data();
    } else {
      view.b_ih_half = b_ih.data();
      view.b_hh_half = b_hh.data();
    }
    return view;
  }
};

// Room for the weights in the order in which forward's kernels read them.
template <class E, class S>
void want_packed(Scratch& scratch, const Layer& layer, bool joins,
                 PackedWeights<S, Word<E>>& packed) {
  const Sizes& sizes = layer.sizes;
  const int64_t gates = gate_blocks(layer.cell) * whole_panels(sizes.hidden_padded());
  const int64_t inputs = words_of<E>(sizes.input), outputs = words_of<E>(sizes.output);
  if (!joins) scratch.want(&packed.input, gates * inputs);
  scratch.want(&packed.recurrent, gates * (joins ? inputs + outputs : outputs));
  if (sizes.projected) {
    scratch.want(&packed.projection,
                 whole_panels(sizes.output_padded()) * words_of<E>(sizes.hidden));
  }
}

template <class S, class W>
void want_biases(Scratch& scratch, const Layer& layer, PackedWeights<S, W>& packed) {
  const int64_t hidden = layer.sizes.hidden_padded();
  scratch.want(&packed.bias, gate_blocks(layer.cell) * whole_panels(hidden));
  scratch.want(&packed.bias_hn, hidden);
}

// Room for rows in words, of values that are kept as E.
template <class E, class S>
void want_words(Scratch& scratch, int threads, int64_t rows, ForwardArgs<S, Word<E>>& args) {
  const Sizes& sizes = args.sizes;
  args.factors_stride = padded(rows);
  args.words_stride =
      rows * words_of<E>(padded(std::max({sizes.input, sizes.hidden, sizes.output})));
  scratch.want(&args.factors, threads * args.factors_stride);
  scratch.want(&args.words, threads * args.words_stride);
}

// Whether a state's rows of (units) lie in the caller's tensor as the kernels read them.
inline bool lies_as_read(int64_t units, const Schedule& schedule) {
  return schedule.order == nullptr && schedule.state_row == nullptr && units == padded(units);
}

// Rows of (B, units) of one direction, in sorted order and where the schedule's states lie, padded
// with zeros, room for `in_front` before each row; zeros where `state` is null.
template <class S>
void fill_state(S* to, const S* state, int64_t units, const Schedule& schedule,
                int64_t in_front = 0) {
  const int64_t stride = in_front + padded(units);
  for (int64_t b = 0; b < schedule.batch; ++b) {
    S* row = to + state_row(schedule, b) * stride + in_front;
    S* end = row;
    if (state != nullptr) {
      const S* from = state + caller_row(schedule, b) * units;
      end = std::copy(from, from + units, row);
    }
    std::fill(end, row + padded(units), S(0));
  }
}

// The chunk that direction `reverse` walks as its index-th, of those between `bounds`; `backwards`
// where the walk is backpropagation's.
inline Chunk chunk_of(const std::vector<int64_t>& bounds, int64_t index, bool reverse,
                      bool backwards) {
  const int64_t count = static_cast<int64_t>(bounds.size()) - 1;
  const int64_t at = reverse != backwards ? count - 1 - index : index;
  return {bounds[at], bounds[at + 1], index == 0, index == count - 1};
}

inline Workload workload_of(const Layer& layer, const Schedule& schedule, int products) {
  Workload work = {layer.cell,
                   layer.sizes,
                   layer.directions,
                   schedule.batch,
                   schedule.steps == 0 ? 0 : schedule.row0[schedule.steps],
                   layer.accumulate == at::kDouble ? 8 : 4,
                   is_narrow(layer)                  ? 2
                   : layer.accumulate == at::kDouble ? 8
                                                     : 4,
                   products};
  find_distance(work, at::get_num_threads());
  return work;
}

// The same while a chunk is walked that begins with so many rows. A plan for these may share rows
// where one for all would not, and must then be the same at any distance.
inline Workload with_rows(Workload work, int64_t rows) {
  if (rows == work.batch) return work;
  work.batch = rows;
  if (work.distance != Distance::kUnknown && !depends_on_distance(work, at::get_num_threads())) {
    work.distance = Distance::kUnknown;
  }
  return work;
}

template <class Direction>
Workload workload_in_chunk(const Workload& work, const Schedule& schedule,
                           const Direction* directions) {
  int64_t rows = 0;
  for (int d = 0; d < work.directions; ++d) {
    rows = std::max(rows, schedule.rows[directions[d].chunk.begin]);
  }
  return with_rows(work, rows);
}

// Runs a kernel on the chunks that the directions have come to.
template <class Args>
void run_chunk(const Workload& work, const Args& args, void (*kernel)(const Args&, const Slot&)) {
  const Workload now = workload_in_chunk(work, args.schedule, args.direction);
  run_team(
      at::get_num_threads(), args.directions, [&](int threads) { return plan_team(now, threads); },
      [&](const Slot& slot) { kernel(args, slot); });
}

// The most threads, and groups, that any chunk is walked by.
struct Most {
  int threads = 1, groups = 1;
};
inline Most most_of_plans(const Workload& work, const Schedule& schedule,
                          const std::vector<int64_t>& bounds) {
  Most most;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    const Workload now = with_rows(work, schedule.rows[bounds[i]]);
    const Plan plan = plan_team(now, at::get_num_threads());
    most = {std::max(most.threads, plan.threads()), std::max(most.groups, plan.groups)};
  }
  return most;
}

// Most rows of a chunk.
inline int64_t chunk_rows(const Schedule& schedule, const std::vector<int64_t>& bounds) {
  int64_t most = 0;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    most = std::max(most, schedule.row0[bounds[i + 1]] - schedule.row0[bounds[i]]);
  }
  return most;
}

}  // namespace fusedrnn
