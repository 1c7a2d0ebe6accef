// The table of one instruction set. A kernel file includes cpu/kernels_prelude.h, opens its target
// region, then includes this file.
#pragma once

#include "cpu/forward_inl.h"
#include "cpu/gradients_inl.h"
#include "cpu/tangents_inl.h"

FUSEDRNN_ISA_BEGIN

template <class S, Vec<S> (*Function)(Vec<S>)>
void map(const S* x, S* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<S>) store(y + i, Function(load(x + i, n - i)), n - i);
}

inline void round_values(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    Bf16::store_half(to + i, load(from + i, n - i), n - i);
  }
}

template <class S>
constexpr KernelTable<S> kernel_table() {
  return {{forward_pack<Cell::kLstm, S>, forward_pack<Cell::kGru, S>,
           forward_pack<Cell::kRnnTanh, S>, forward_pack<Cell::kRnnRelu, S>},
          {forward_chunk<Cell::kLstm, S>, forward_chunk<Cell::kGru, S>,
           forward_chunk<Cell::kRnnTanh, S>, forward_chunk<Cell::kRnnRelu, S>},
          {backward_chunk<Cell::kLstm, S>, backward_chunk<Cell::kGru, S>,
           backward_chunk<Cell::kRnnTanh, S>, backward_chunk<Cell::kRnnRelu, S>},
          {tangents_forward<Cell::kLstm, S>, tangents_forward<Cell::kGru, S>,
           tangents_forward<Cell::kRnnTanh, S>, tangents_forward<Cell::kRnnRelu, S>},
          {tangents_backward<Cell::kLstm, S>, tangents_backward<Cell::kGru, S>,
           tangents_backward<Cell::kRnnTanh, S>, tangents_backward<Cell::kRnnRelu, S>},
          tangents_pack<S>,
          tangents_product<S>,
          map<S, sigmoid<Vec<S>>>,
          map<S, tanh<Vec<S>>>};
}

template <class F>
constexpr NarrowTable narrow_table() {
  NarrowTable table = {
      {forward_pack<Cell::kLstm, float, F>, forward_pack<Cell::kGru, float, F>,
       forward_pack<Cell::kRnnTanh, float, F>, forward_pack<Cell::kRnnRelu, float, F>},
      {forward_chunk<Cell::kLstm, float, F>, forward_chunk<Cell::kGru, float, F>,
       forward_chunk<Cell::kRnnTanh, float, F>, forward_chunk<Cell::kRnnRelu, float, F>},
      {},
      nullptr};
  if constexpr (std::is_same_v<F, Bf16>) {
    table.round = round_values;
    table.backward[static_cast<int>(Cell::kLstm)] = backward_chunk<Cell::kLstm, float, uint16_t>;
    table.backward[static_cast<int>(Cell::kGru)] = backward_chunk<Cell::kGru, float, uint16_t>;
    table.backward[static_cast<int>(Cell::kRnnTanh)] =
        backward_chunk<Cell::kRnnTanh, float, uint16_t>;
  }
  return table;
}

FUSEDRNN_ISA_END
