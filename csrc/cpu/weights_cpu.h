// A layer's parameters as the kernels read them.
#pragma once

#include <ATen/ATen.h>

#include "cpu/tensors_cpu.h"
#include "layer.h"

namespace fusedrnn {

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
class WeightWords {
 public:
  WeightWords() = default;
  explicit WeightWords(const at::Tensor& t) {
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
  WeightWords<E> w_ih, w_hh, w_hr;
  Values<E> b_ih, b_hh;

  WeightValues() = default;
  WeightValues(const Layer& layer, at::TensorList params, int d, bool biases)
      : w_ih(layer.param(params, d, Param::kWih)), w_hh(layer.param(params, d, Param::kWhh)) {
    if (layer.has_biases && biases) {
      b_ih = Values<E>(layer.param(params, d, Param::kBih));
      b_hh = Values<E>(layer.param(params, d, Param::kBhh));
    }
    if (layer.sizes.projected) w_hr = WeightWords<E>(layer.param(params, d, Param::kWhr));
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

}  // namespace fusedrnn
