// One row of the batch and one unit in back-propagation through a part of time, as
// unit_forward.cuh goes forward.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/step_of_row.cuh"

FUSEDRNN_ISA_BEGIN

template <Cell kCell, class E>
class UnitBackward {
 public:
  using S = Arithmetic<E>;
  static constexpr GradientBlocks kBlocks = gradient_blocks(kCell);

  struct Given {
    StepOfRow kind;
    SavedUnit<S> saved;
  };

  UnitBackward() = default;
  FUSEDRNN_D UnitBackward(const PartBackward<E>& p, int64_t row, int unit, bool mine)
      : row_(row), unit_(unit), mine_(mine && row < p.part.order.batch && unit < p.hidden) {
    const int64_t at = row * p.hidden + unit;
    if (!mine_) return;
    direct_ = p.direct[at];
    if (p.dc != nullptr) dc_ = p.dc[at];
  }

  FUSEDRNN_D Given given(const PartBackward<E>& p, int64_t i) const {
    const Step step = p.part.step(p.part.walked_back(i));
    Given g{};
    if (mine_) g.kind = kind_of(step, row_);
    if (!is_valid(g.kind)) return g;
    g.saved = saved_unit<kCell>(p.saved, step, row_, unit_, p.previous != nullptr);
    return g;
  }

  // product: what the step after gave back through W_hh, zero at first. Returns this step's
  // gradients, zeros in padding.
  FUSEDRNN_D UnitGradient<S> step(const Given& now, S product) {
    const S carried = direct_ + product;
    if (!is_valid(now.kind)) {
      direct_ = carried;
      return {};
    }
    const bool cut = now.kind == StepOfRow::kCut;
    const UnitGradient<S> d =
        backward_unit<kCell>(now.saved, (cut ? S(0) : carried) + now.saved.dy, cut ? S(0) : dc_);
    direct_ = d.direct;
    dc_ = d.dc;
    return d;
  }

  FUSEDRNN_D void put_away(const PartBackward<E>& p, int64_t i, const Given& now,
                           const UnitGradient<S>& d) const {
    if (now.kind == StepOfRow::kNone) return;
    const int64_t row = p.part.rows(p.part.walked_back(i)).first - p.part.first + row_;
    FUSEDRNN_UNROLL
    for (int block = 0; block < kBlocks.count; ++block) {
      store(p.dgates + (row * kBlocks.count + block) * p.hidden + unit_, d.dgates[block]);
    }
    if (p.previous != nullptr) store(p.previous + row * p.hidden + unit_, now.saved.h_prev);
  }

  FUSEDRNN_D void finish(const PartBackward<E>& p, S product) const {
    if (!mine_) return;
    const int64_t at = row_ * p.hidden + unit_;
    p.direct[at] = direct_ + product;
    if (p.dc != nullptr) p.dc[at] = dc_;
  }

 private:
  int64_t row_ = 0;
  int unit_ = 0;
  bool mine_ = false;
  S direct_ = S(0), dc_ = S(0);
};

FUSEDRNN_ISA_END
