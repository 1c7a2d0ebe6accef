// The gradient of the state: what goes from a step's dgates to the step before it through W_hh, and
// what arrives at the initial states. The same for every cell.
#pragma once

#include "cpu/few_rows_inl.h"
#include "cpu/walk.h"

FUSEDRNN_ISA_BEGIN

template <class S, class E>
class StateGradients {
 public:
  StateGradients(Cell cell, const BackwardArgs<S, E>& args,
                 const BackwardDirection<S, E>& direction, const Slot& slot)
      : sizes_(args.sizes),
        schedule_(args.schedule),
        d_(direction),
        slot_(slot),
        zeros_(args.zeros),
        hidden_(sizes_.hidden_padded()),
        output_(sizes_.output_padded()),
        own_output_panels_(share(panel_count<S>(output_, kStepVectors), slot.part, slot.parts)),
        own_hidden_panels_(share(panel_count<S>(hidden_, kStepVectors), slot.part, slot.parts)),
        own_rows_(own_rows(schedule_, d_.chunk, slot)),
        first_row_(schedule_.row0[d_.chunk.begin]),
        dgates_(dgates_of_group(args, direction, slot)),
        blocks_(gradient_blocks(cell)),
        carries_h_(carries_h(cell)) {}

  // W_hh by output column, W_hr by hidden unit: this thread's panels, or its group's share of them.
  void pack() const {
    const auto& w = d_.weights;
    const int64_t k = recurrent_words();
    if (d_.packed.recurrent != nullptr) {
      pack_by_column<kStepVectors, F>(
          d_.packed.recurrent, sizes_.output, k, share(k, slot_.group, slot_.groups),
          own_output_panels_, [&](int64_t i) -> const E* {
            const int64_t unit = i % hidden_;
            const int gate = blocks_.hidden_gate[i / hidden_];
            return unit < sizes_.hidden
                       ? weight_row<F, E>(w.w_hh, gate * sizes_.hidden + unit, sizes_.output)
                       : nullptr;
          });
    }
    if (sizes_.projected) {
      const int64_t outputs = format_words<F>(sizes_.output);
      pack_by_column<kStepVectors, F>(
          d_.packed.projection, sizes_.hidden, outputs, share(outputs, slot_.group, slot_.groups),
          own_hidden_panels_, [&](int64_t i) -> const E* {
            return i < sizes_.output ? weight_row<F, E>(w.w_hr, i, sizes_.hidden) : nullptr;
          });
    }
  }

 protected:
  using F = FormatOf<E>;
  static constexpr int kWidth = kStepVectors * kLanes<S>;
  static constexpr int kSideRows = kSideTileRows<F>;

  // The zeros as values of type E.
  const E* zeros() const { return reinterpret_cast<const E*>(zeros_); }

  E* dgates(int64_t packed_row) const {
    return dgates_ + (packed_row - first_row_) * d_.dgates_stride;
  }

  // dgates of step u, which was walked just before, in this chunk or at the end of the last one.
  const E* dgates_of(int64_t u, int64_t b) const {
    if (u >= d_.chunk.begin && u < d_.chunk.end) return dgates(schedule_.row0[u] + b);
    return d_.dgates_next + b * d_.dgates_stride;
  }

  // Keeps this thread's part of step t's for the next chunk, whose first step reads them.
  void keep_dgates(int64_t t, Range rows) const {
    const Range own = share(d_.dgates_stride, slot_.part, slot_.parts);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const E* from = dgates(schedule_.row0[t] + b);
      std::copy(from + own.begin, from + own.end,
                d_.dgates_next + b * d_.dgates_stride + own.begin);
    }
  }

  // The same, as they reach the step before u: not past a reset, nor for `starting` rows, whose
  // last step that is.
  const E* dgates_after(int64_t u, int64_t b, bool starting) const {
    return starting || is_reset(d_.reset, schedule_, u, b) ? zeros() : dgates_of(u, b);
  }

  // dy of a packed row, or zeros.
  const E* dy_of(int64_t packed_row) const {
    return d_.dy == nullptr ? zeros() : d_.dy + io_row(schedule_, packed_row) * d_.dy_stride;
  }

  // Steps read W_hh from either end in turn.
  static bool from_end(int64_t u) { return u % 2 != 0; }

  // Tiles of left_at(b), the dgates that come from step u, times W_hh.
  template <int MostRows, class LeftAt, class Epilogue>
  FUSEDRNN_HD void dh_product(int64_t u, Range rows, bool starting, LeftAt left_at,
                              Epilogue epilogue) const {
    const int64_t k = recurrent_words();
    product<F, kStepVectors, Sums::kInMemory, MostRows>(rows, own_output_panels_, left_at,
                                                        d_.packed.recurrent, k * kWidth,
                                                        starting ? 0 : k, epilogue, from_end(u));
  }

  // The gradient of h_n, of rows whose last step it was.
  FUSEDRNN_HD Vec<S> final_gradient(int64_t b, int64_t unit) const {
    return d_.dh_n == nullptr ? Vec<S>{} : load(d_.dh_n + b * output_ + unit);
  }

  // f(b, unit, sum) for every vector of the tile that lies within `limit` units.
  template <int R, int NV, class Visit>
  static FUSEDRNN_HD void each(const Tile<S, R, NV>& tile, int64_t b0, int64_t panel, int64_t limit,
                               Visit f) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < NV; ++v) {
        const int64_t unit = panel * kWidth + v * kLanes<S>;
        if (unit < limit) f(b0 + r, unit, tile.sum[r][v]);
      }
    }
  }

  // With a projection: dh of step t into d_.dh.
  __attribute__((noinline)) void output_gradients(int64_t t, int64_t u, Range rows,
                                                  bool starting) const {
    const int64_t row0 = schedule_.row0[t] - first_row_;
    dh_product<kSideRows>(
        u, rows, starting, [&](int64_t b) { return as_words<E>(dgates_after(u, b, starting)); },
        [&](const auto& tile, int64_t b0, int64_t panel) __attribute__((always_inline)) {
          each(tile, b0, panel, output_,
               [&](int64_t b, int64_t unit, Vec<S> dh) __attribute__((always_inline)) {
                 dh += read(dy_of(schedule_.row0[t] + b) + unit, sizes_.output - unit);
                 if (starting) dh += final_gradient(b, unit);
                 // Padding is read too where words hold two values; of an infinite gradient it
                 // would be NaN.
                 write(d_.dh + (row0 + b) * output_ + unit,
                       with_first_lanes<S>(dh, sizes_.output - unit));
               });
        });
  }

  // The gradients of the initial states of rows whose first step, in forward order, was u.
  void finish(int64_t u, Range rows) const {
    if (rows.size() <= 0) return;
    if (d_.dh0 != nullptr) finish_h(u, rows);
    if (d_.dc0 != nullptr) finish_c(u, rows);
  }

  __attribute__((noinline)) void finish_h(int64_t u, Range rows) const {
    const auto is_cut = [&](int64_t b) { return is_reset(d_.reset, schedule_, u, b); };
    const auto put = [&](int64_t b, int64_t unit, Vec<S> dh) __attribute__((always_inline)) {
      if (carries_h_ && !is_cut(b)) {
        dh += load(d_.carry + state_row(schedule_, b) * hidden_ + unit);
      }
      store(d_.dh0 + caller_row(schedule_, b) * sizes_.output + unit, dh, sizes_.output - unit);
    };
    if (d_.packed.recurrent == nullptr) {
      const BlockRows<E> weight = {weight_row<F, E>(d_.weights.w_hh, 0, sizes_.output),
                                   blocks_.hidden_gate,
                                   blocks_.gates,
                                   sizes_.hidden,
                                   hidden_,
                                   sizes_.output};
      const int64_t panels = panel_count<S>(sizes_.output, kChunkVectors);
      product_by_column<S>(
          rows, share(panels, slot_.part, slot_.parts),
          [&](int64_t b) { return dgates_after(u, b, false); }, weight, put);
      return;
    }
    dh_product<kTileRows<F, kStepVectors>>(  // of a single step, a fifth of the work
        u, rows, false, [&](int64_t b) { return as_words<E>(dgates_after(u, b, false)); },
        [&](const auto& tile, int64_t b0, int64_t panel)
            __attribute__((always_inline)) { each(tile, b0, panel, sizes_.output, put); });
  }

  void finish_c(int64_t u, Range rows) const {
    const int64_t begin = own_hidden_panels_.begin * kWidth;
    const int64_t end = std::min(own_hidden_panels_.end * kWidth, sizes_.hidden);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      S* to = d_.dc0 + caller_row(schedule_, b) * sizes_.hidden;
      const bool cut = is_reset(d_.reset, schedule_, u, b);
      const S* carry = d_.carry + state_row(schedule_, b) * hidden_;
      for (int64_t i = begin; i < end; ++i) to[i] = cut ? S(0) : carry[i];
    }
  }

  const Sizes& sizes_;
  const Schedule& schedule_;
  const BackwardDirection<S, E>& d_;
  const Slot& slot_;
  const S* const zeros_;
  const int64_t hidden_, output_;  // padded
  const Range own_output_panels_, own_hidden_panels_;
  const Range own_rows_;
  const int64_t first_row_;  // packed, of the chunk

 private:
  int64_t recurrent_words() const { return format_words<F>(blocks_.gates * hidden_); }

  E* const dgates_;
  const GradientBlocks blocks_;
  const bool carries_h_;
};

FUSEDRNN_ISA_END
