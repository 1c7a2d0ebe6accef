// PersistentForward<E> and PersistentBackward<E> from the bodies and the launcher.
#pragma once

#include <iterator>
#include <stdexcept>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/persistent_backward.cuh"
#include "cuda/persistent_forward.cuh"

namespace fusedrnn {

// f<units, depths, rows>(), for a form of kPersistentForms.
template <class E, Precision kPrecision, int kIndex = 0, class F>
auto with_form(const PersistentForm& form, const F& f) {
  constexpr auto is = kPersistentForms[kIndex];
  if constexpr (is.of(sizeof(E), kPrecision)) {
    if (form.units == is.units && form.depths == is.depths && form.rows == is.rows) {
      return f.template operator()<is.units, is.depths, is.rows>();
    }
  }
  if constexpr (kIndex + 1 < std::size(kPersistentForms)) {
    return with_form<E, kPrecision, kIndex + 1>(form, f);
  } else {
    throw std::logic_error("no form");
  }
}

// Calls f with the kernel for a cell and a form.
template <template <Cell, class, Precision, int, int, int> class Body, class E, class F>
auto with_persistent_body(Cell cell, const PersistentForm& form, const F& f) {
  const auto of_precision = [&]<Cell kCell, Precision kPrecision>() {
    return with_form<E, kPrecision>(form, [&]<int kUnits, int kDepths, int kRows>() {
      return f.template operator()<Body<kCell, E, kPrecision, kUnits, kDepths, kRows>>();
    });
  };
  return with_cell(cell, [&]<Cell kCell>() {
    if constexpr (std::is_same_v<E, float>) {
      if (form.precision == Precision::kTf32) {
        return of_precision.template operator()<kCell, Precision::kTf32>();
      }
    }
    return of_precision.template operator()<kCell, Precision::kExact>();
  });
}

template <template <Cell, class, Precision, int, int, int> class Body, class E>
int64_t resident_persistent(Cell cell, const PersistentForm& form) {
  return with_persistent_body<Body, E>(cell, form, [&]<class B>() { return resident_blocks<B>(); });
}

template <template <Cell, class, Precision, int, int, int> class Body, class E, class Part>
void launch_persistent(Cell cell, const SideBySide<Part>& sides, const Exchange& exchange,
                       CudaStream stream) {
  const PersistentForm& form = exchange.form;
  const int64_t across = persistent_units(sides.part[0].hidden) / form.units;
  const int64_t down = (exchange.rows + form.rows - 1) / form.rows;
  const int64_t each = across * down;
  with_persistent_body<Body, E>(cell, form, [&]<class B>() {
    launch_together(B{sides, each, exchange}, each * sides.count, stream);
  });
}

template <class E>
int64_t PersistentForward<E>::resident(Cell cell, const PersistentForm& form) {
  return resident_persistent<FUSEDRNN_ISA::PersistentForwardBody, E>(cell, form);
}
template <class E>
void PersistentForward<E>::run(Cell cell, const SideBySide<PartForward<E>>& sides,
                               const Exchange& exchange, CudaStream stream) {
  launch_persistent<FUSEDRNN_ISA::PersistentForwardBody, E>(cell, sides, exchange, stream);
}

template <class E>
int64_t PersistentBackward<E>::resident(Cell cell, const PersistentForm& form) {
  return resident_persistent<FUSEDRNN_ISA::PersistentBackwardBody, E>(cell, form);
}
template <class E>
void PersistentBackward<E>::run(Cell cell, const SideBySide<PartBackward<E>>& sides,
                                const Exchange& exchange, CudaStream stream) {
  launch_persistent<FUSEDRNN_ISA::PersistentBackwardBody, E>(cell, sides, exchange, stream);
}

}  // namespace fusedrnn
