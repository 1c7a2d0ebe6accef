// PersistentForward<E> and PersistentBackward<E> from the bodies and the launcher.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/persistent_backward.cuh"
#include "cuda/persistent_forward.cuh"

namespace fusedrnn {

// Calls f with the kernel for a cell and a form of kPersistentForms.
template <template <Cell, class, Precision, int, int, int> class Body, class E, class F>
auto with_persistent_body(Cell cell, const PersistentForm& form, const F& f) {
  const auto of_precision = [&]<Cell kCell, Precision kPrecision>() {
    if constexpr (sizeof(E) == 2) {
      if (form.units == 32) {
        if (form.rows == 8) return f.template operator()<Body<kCell, E, kPrecision, 32, 2, 8>>();
        return f.template operator()<Body<kCell, E, kPrecision, 32, 2, 16>>();
      }
    }
    if (form.depths == 4) {
      if (form.rows == 8) return f.template operator()<Body<kCell, E, kPrecision, 16, 4, 8>>();
      if (form.rows == 16) return f.template operator()<Body<kCell, E, kPrecision, 16, 4, 16>>();
      return f.template operator()<Body<kCell, E, kPrecision, 16, 4, 32>>();
    }
    if (form.rows == 8) return f.template operator()<Body<kCell, E, kPrecision, 16, 8, 8>>();
    return f.template operator()<Body<kCell, E, kPrecision, 16, 8, 16>>();
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

template <template <Cell, class, Precision, int, int, int> class Body, class E, class Params>
void launch_persistent(Cell cell, const Params& p, const Exchange& exchange, Stream stream) {
  const PersistentForm& form = exchange.form;
  const int64_t across = persistent_units(p.hidden) / form.units;
  const int64_t down = (exchange.rows + form.rows - 1) / form.rows;
  with_persistent_body<Body, E>(
      cell, form, [&]<class B>() { launch_together(B{p, exchange}, across * down, stream); });
}

template <class E>
int64_t PersistentForward<E>::resident(Cell cell, const PersistentForm& form) {
  return resident_persistent<FUSEDRNN_ISA::PersistentForwardBody, E>(cell, form);
}
template <class E>
void PersistentForward<E>::run(Cell cell, const PartForward<E>& p, const Exchange& exchange,
                               Stream stream) {
  launch_persistent<FUSEDRNN_ISA::PersistentForwardBody, E>(cell, p, exchange, stream);
}

template <class E>
int64_t PersistentBackward<E>::resident(Cell cell, const PersistentForm& form) {
  return resident_persistent<FUSEDRNN_ISA::PersistentBackwardBody, E>(cell, form);
}
template <class E>
void PersistentBackward<E>::run(Cell cell, const PartBackward<E>& p, const Exchange& exchange,
                                Stream stream) {
  launch_persistent<FUSEDRNN_ISA::PersistentBackwardBody, E>(cell, p, exchange, stream);
}

}  // namespace fusedrnn
