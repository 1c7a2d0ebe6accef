// Which rows of a chunk a thread's sums go over, and where they go.
//
// Mostly all threads share the results: each sums over all rows of the chunk. Groups may sum apart
// instead, each over the rows that it walked, to gradients of its own that are added up in the end:
// what a group reads and writes is then nobody else's, from the first chunk to the last.
#pragma once

#include "cpu/pack_inl.h"
#include "cpu/walk.h"

FUSEDRNN_ISA_BEGIN

// Where a group after the first sums apart.
template <class S, class E>
WeightGradients<S> gradients_apart(Cell cell, const BackwardArgs<S, E>& args,
                                   const BackwardDirection<S, E>& direction, int group) {
  S* next = direction.group_gradients + (group - 1) * args.group_gradients_stride;
  const auto take = [&](const S* result, int64_t count) {
    S* const here = next;
    next += count;
    return result == nullptr ? nullptr : here;
  };
  const WeightGradients<S>& r = direction.results;
  const GradientSizes size(cell, args.sizes);
  return {take(r.dw_ih, size.w_ih), take(r.dw_hh, size.w_hh), take(r.db_ih, size.b),
          take(r.db_hh, size.b), take(r.dw_hr, size.w_hr)};
}

// Adds this thread's share of what groups have summed apart to the results, in the groups' order.
template <class S, class E>
void add_up(Cell cell, const BackwardArgs<S, E>& args, const BackwardDirection<S, E>& direction,
            const Slot& slot) {
  const auto add = [&](S* to, const S* from, int64_t count) {
    if (to == nullptr) return;
    const Range mine = share(count, slot.thread, slot.threads);
    for (int64_t i = mine.begin; i < mine.end; i += kLanes<S>) {
      const int64_t valid = mine.end - i;
      store(to + i, load(to + i, valid) + load(from + i, valid), valid);
    }
  };
  const WeightGradients<S>& to = direction.results;
  const GradientSizes size(cell, args.sizes);
  for (int group = 1; group < args.apart_groups; ++group) {
    if (direction.group_has_sum[group] == 0) continue;
    const WeightGradients<S> from = gradients_apart(cell, args, direction, group);
    add(to.dw_ih, from.dw_ih, size.w_ih);
    add(to.dw_hh, from.dw_hh, size.w_hh);
    add(to.db_ih, from.db_ih, size.b);
    add(to.db_hh, from.db_hh, size.b);
    add(to.dw_hr, from.dw_hr, size.w_hr);
  }
}

template <class S, class E>
class ChunkRows {
 public:
  ChunkRows(Cell cell, const BackwardArgs<S, E>& args, const BackwardDirection<S, E>& direction,
            const Slot& slot)
      : blocks_(gradient_blocks(cell)),
        args_(args),
        sizes_(args.sizes),
        schedule_(args.schedule),
        d_(direction),
        slot_(slot),
        apart_(sums_apart(args, slot)),
        output_(sizes_.output_padded()),
        first_row_(schedule_.row0[d_.chunk.begin]),
        dgates_(dgates_of_group(args, direction, slot)),
        own_(apart_ ? own_rows(schedule_, d_.chunk, slot) : Range{0, schedule_.batch}),
        before_(rows_before()),
        group_rows_(apart_ ? args.group_rows + before_ : nullptr),
        rows_(apart_ ? find_chunk_rows(schedule_, d_.chunk, own_, args.group_rows + before_)
                     : schedule_.row0[d_.chunk.end] - first_row_),
        words_(format_words<F>(rows_)),
        writes_(apart_ && slot.group > 0 ? d_.group_has_sum[slot.group] == 0 : d_.chunk.first),
        to_(apart_ && slot.group > 0 ? gradients_apart(cell, args, d_, slot.group) : d_.results) {}

 protected:
  using F = FormatOf<E>;
  using W = Word<E>;

  void meet() const {
    if (!apart_) slot_.wait_team();
  }
  // This thread's share of work that is split.
  Range own(int64_t count) const {
    return apart_ ? Range{0, count} : share(count, slot_.thread, slot_.threads);
  }

  // Of the summed rows the index-th, as a row of the chunk.
  int64_t chunk_row(int64_t index) const {
    return group_rows_ == nullptr ? index : group_rows_[index];
  }
  int64_t x_row(int64_t index) const { return io_row(schedule_, first_row_ + chunk_row(index)); }
  const E* x_at(int64_t index) const { return d_.x + x_row(index) * sizes_.input; }

  // Where the states lie that entered the steps of the rows `some`; null: zeros.
  const E** previous() const { return args_.previous + before_; }
  void find_previous(Range some) const {
    int64_t t = d_.chunk.begin;
    for (int64_t i = some.begin; i < some.end; ++i) {
      const int64_t packed_row = first_row_ + chunk_row(i);
      while (packed_row >= schedule_.row0[t + 1]) ++t;
      previous()[i] = entering_h(d_, schedule_, t, packed_row - schedule_.row0[t], output_);
    }
  }

  // What is laid out as panels: x, and the states, or for dW_hr o tanh(c).
  enum Operand { kInput, kState };

  // Panels of the summed rows; a group's behind those of the groups before it.
  W* panels(Operand which) const {
    const int64_t columns = which == kInput ? sizes_.input : std::max(sizes_.output, sizes_.hidden);
    const int64_t words = apart_ ? words_before<E>(before_, slot_.group) : 0;
    return args_.panels[which] + words * whole_panels(columns);
  }

  const GradientBlocks blocks_;
  const BackwardArgs<S, E>& args_;
  const Sizes& sizes_;
  const Schedule& schedule_;
  const BackwardDirection<S, E>& d_;
  const Slot& slot_;
  const bool apart_;
  const int64_t output_;     // padded
  const int64_t first_row_;  // packed, of the chunk
  const E* const dgates_;

 private:
  int64_t rows_before() const {
    int64_t count = 0;
    for (int64_t t = d_.chunk.begin; own_.begin > 0 && t < d_.chunk.end; ++t) {
      count += std::min(own_.begin, schedule_.rows[t]);
    }
    return count;
  }

  const Range own_;       // of a step's rows
  const int64_t before_;  // rows of the groups before this one, in the chunk
  const int64_t* const group_rows_;

 protected:
  const int64_t rows_;   // to sum over
  const int64_t words_;  // of them
  const bool writes_;    // to to_, nothing being there yet
  const WeightGradients<S> to_;
};

FUSEDRNN_ISA_END
