// What the recurrent kernels are given: plain structs, a shape and a lifetime on every pointer.
//
// Names: T steps, B rows of the batch, I input_size, H hidden_size, P proj_size (H without a
// projection), D directions. Hp and Pp are H and P rounded up to kUnitAlignment: everything the
// library itself allocates is padded to it, with zeros in the padding, so vector code needs no
// tails there. N valid (step, row) pairs, "packed rows", in PackedSequence's order: rows sorted by
// length, longest first; step t holds packed rows [row0[t], row0[t] + rows[t]).
//
// S is the type of the arithmetic, float or double. bfloat16 is read and written as it lies where
// products take it; float16, and bfloat16 before a ReLU, the caller widens before and rounds after.
// W is what products read: S, or 32-bit words of narrow values that lie one after another in k
// (cpu/formats_inl.h); a row of n values is then padded to whole words with zeros. Every pointer
// lives at least as long as the call.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fusedrnn {

inline constexpr int64_t kUnitAlignment = 16;

inline constexpr int64_t padded(int64_t units) {
  return (units + kUnitAlignment - 1) / kUnitAlignment * kUnitAlignment;
}

// Values from one row to the next, of rows of `width` values of type E. Rows whole multiples of 2
// KiB apart fall into few sets of the first cache, and a tile's lines throw each other out: such
// rows are laid a line further apart.
template <class E>
constexpr int64_t row_stride(int64_t width) {
  constexpr int64_t few_sets = 2048 / sizeof(E), line = 64 / sizeof(E);
  return width % few_sets == 0 ? width + line : width;
}

// Rounded up to whole panels of any instruction set (columns of at most 4 vectors of 16 lanes).
inline constexpr int64_t whole_panels(int64_t columns) { return (columns + 63) / 64 * 64; }

enum class Cell { kLstm, kGru, kRnnTanh, kRnnRelu };
inline constexpr int kCells = 4;

// Blocks of H columns per cell: the gates of W_ih and W_hh; what is kept of each step for backward
// (LSTM i, f, g, o; GRU r, z, n, W_hn h + b_hn); the gradients of the gates (LSTM i, f, g, o; GRU
// W_hn h + b_hn, r, z, W_in x + b_in, so that the hidden side is the first three blocks and the
// input side the last three).
inline constexpr int gate_blocks(Cell cell) {
  return cell == Cell::kLstm ? 4 : cell == Cell::kGru ? 3 : 1;
}
inline constexpr int saved_blocks(Cell cell) {
  return cell == Cell::kLstm || cell == Cell::kGru ? 4 : 1;
}
inline constexpr bool has_cell_state(Cell cell) { return cell == Cell::kLstm; }
inline constexpr bool is_rnn(Cell cell) { return cell == Cell::kRnnTanh || cell == Cell::kRnnRelu; }
// An RNN's output is all that its backward pass needs.
inline constexpr bool keeps_gates(Cell cell) { return !is_rnn(cell); }
// The GRU scales the half of n that comes from h, bias included: n's two halves are kept apart.
inline constexpr bool keeps_n_apart(Cell cell) { return cell == Cell::kGru; }
// What backward carries from step to step besides dgates is a share of dh itself (GRU: dh z), not
// the gradient of another state (LSTM: dc).
inline constexpr bool carries_h(Cell cell) { return cell == Cell::kGru; }

// Which gate (row block of W_ih, W_hh) each block of dgates belongs to on either side, -1: none.
struct GradientBlocks {
  int count;  // blocks
  int gates;  // of either side; the input side is the last `gates` blocks
  int input_gate[4], hidden_gate[4];
  constexpr int input_begin() const { return count - gates; }
  // Whether the hidden side's blocks stand in the order of the weight's gates.
  constexpr bool hidden_in_order() const {
    for (int i = 0; i < gates; ++i) {
      if (hidden_gate[i] != i) return false;
    }
    return true;
  }
};

inline constexpr GradientBlocks gradient_blocks(Cell cell) {
  if (cell == Cell::kLstm) return {4, 4, {0, 1, 2, 3}, {0, 1, 2, 3}};
  if (cell == Cell::kGru) return {4, 3, {-1, 0, 1, 2}, {2, 0, 1, -1}};
  return {1, 1, {0}, {0}};
}

// Which packed rows a step has, and where they lie in the caller's tensors.
struct Schedule {
  int64_t steps;          // T
  int64_t batch;          // B
  const int64_t* rows;    // (T), non-increasing
  const int64_t* row0;    // (T + 1)
  const int64_t* io_row;  // (N) packed row -> row of x, y, dx, dy; null: the same
  const int64_t*
      order;  // (B) sorted row -> row of h_n and of the states' gradients; null: the same
  const int64_t* state_row;  // (B + 1) sorted row -> row of the states that a walk keeps (h, c,
                             // h_tilde, carry), groups lying apart; the last: how many there are;
                             // null: the same
};

struct Sizes {
  int64_t input;   // I
  int64_t hidden;  // H
  int64_t output;  // P
  bool projected;
  int64_t hidden_padded() const { return padded(hidden); }
  int64_t output_padded() const { return padded(output); }
  // Zeros that stand for a row of states or of gradients of all gates.
  int64_t zero_count() const {
    return 4 * hidden_padded() > output_padded() ? 4 * hidden_padded() : output_padded();
  }
};

// In a call without packed weights, rows may be laid across the vectors (cpu/across_inl.h): from
// the first number on, at most the second at a time.
inline constexpr int64_t kLeastAcross = 8, kMostAcross = 256;

// The word that products read where values are kept as E.
template <class E>
struct WordOf {
  using Word = E;
};
template <>
struct WordOf<uint16_t> {
  using Word = uint32_t;
};
template <class E>
using Word = typename WordOf<E>::Word;

// Words of k values, `each` to a word; of values kept as E.
constexpr int64_t words_of(int64_t k, int64_t each) { return (k + each - 1) / each; }
template <class E>
inline constexpr int64_t kWordValues = sizeof(Word<E>) / sizeof(E);
template <class E>
constexpr int64_t words_of(int64_t k) {
  return words_of(k, kWordValues<E>);
}

// What the kernels keep for backward where products read words W.
template <class S, class W>
using Saved = std::conditional_t<std::is_same_v<S, W>, S, uint16_t>;

// One direction's parameters, row-major as torch.nn keeps them, G = gate_blocks.
template <class S, class W = S>
struct Weights {
  const W* w_ih;  // (G*H, I)
  const W* w_hh;  // (G*H, P)
  const S* b_ih;  // (G*H) or null
  const S* b_hh;  // (G*H) or null
  const W* w_hr;  // (P, H) or null
  // bfloat16, in place of b_ih and b_hh; or null
  const uint16_t *b_ih_half = nullptr, *b_hh_half = nullptr;
};

// What turns the sums of 8-bit products into values: (sum - offset) * factor * the row's factor.
struct ColumnScale {
  const float* factor;    // (columns), of the weight
  const int32_t* offset;  // (columns), 128 times the sum of the weight's 8-bit values
};

// The same, in the order in which the kernels read them; the caller owns the memory, the kernels
// fill it at the first chunk. A panel is [K][columns of the panel], see cpu/gemm_inl.h. In a
// call too short to pay for it, all but the biases are null (backward: input and recurrent) and the
// weights are read as they lie.
template <class S, class W = S>
struct PackedWeights {
  W* input;       // forward: W_ih by hidden unit; backward: W_ih by input column
  W* recurrent;   // forward: W_hh by hidden unit, behind W_ih where the input is joined to the
                  // state; backward: W_hh by output column
  W* projection;  // forward: W_hr by output column; backward: by hidden unit
  S* bias;        // forward: (G, Hp), b_ih + b_hh where they may be added up
  S* bias_hn;     // forward, GRU: (Hp), b_hn
  ColumnScale input_scale, recurrent_scale;  // forward, 8-bit weights: columns (G, Hp)
  ColumnScale projection_scale;              // the same: columns (Pp)
};

// About how many (step, row) pairs a segment of time has, of a call that keeps for backward just
// the cell state at the segments' bounds; in steps, at least one.
inline constexpr int64_t kSegmentRows = 256;
constexpr int64_t segment_steps(int64_t batch) {
  return batch >= kSegmentRows ? 1 : kSegmentRows / (batch > 0 ? batch : 1);
}

// A range of steps, [begin, end) in time whatever the direction. Chunks are handed to the kernels
// in the order in which they are walked.
struct Chunk {
  int64_t begin, end;
  bool first, last;  // in walking order
};

template <class S, class W = S>
struct ForwardDirection {
  bool reverse;
  Chunk chunk;
  Weights<S, W> weights;
  PackedWeights<S, W> packed;
  const S* x;  // (io rows, I)
  S* y;        // (io rows, y_stride), this direction's P columns
  int64_t y_stride;
  const uint16_t* x_half;  // bfloat16, in place of x; or null
  uint16_t* y_half;        // the same in place of y
  S* gates;  // packed rows of the chunk, (., gates_stride): projected gates, then what is saved;
             // null where neither is
  int64_t gates_stride;         // >= saved_blocks * Hp
  int64_t gates_thread_stride;  // from one thread's gates to the next one's; 0: all in one place,
                                // as saved
  uint16_t* saved_half;         // bfloat16: where it is saved instead, (., saved_stride); or null
  int64_t saved_stride;
  S* cells;  // packed rows of the whole sequence, (., cells_stride), or null; LSTM
  int64_t cells_stride;
  S* h[2];     // (state rows, joined + Pp): the state, read from and written to in turns; the first
               // holds h0 at first, the second too of rows that start at a later step
  int turn;    // which of the two the chunk's first step reads
  S* c;        // (state rows, Hp): the LSTM's cell state, in place; holds c0 at first, c_n at last
  S* h_tilde;  // (state rows, Hp): o tanh(c) before a projection
  S* h_n;      // (B, P), caller's rows: written for every row that has a step
  const uint8_t* reset;  // (N): the state entering the step is zero; or null
  // (io rows, y_stride): the states of a call made before. Then nothing is walked: gates and cells
  // of all the chunk's rows are made anew at once. h[0] and c, which hold h0 and c0, stay as they
  // are; the second h, (threads, Hp or Pp, the larger), and y, the same, take what nobody reads;
  // cells are those of the chunk and of the step walked just before it, whose values are given. Or
  // null.
  const S* known = nullptr;
};

// Where one row's step reads and writes, found once for all its tiles. What is kept for backward
// has type E.
template <class S, class E>
struct ForwardRow {
  const S* gates;   // (G, Hp): W_ih x + biases, or biases alone
  E* saved;         // (saved_blocks, Hp): in the place of gates where it has their type; or null
  S* cells;         // (Hp), or null; LSTM
  const S* c_prev;  // (Hp), LSTM; zeros after a reset
  S* c;             // (Hp), LSTM
  const S* left;    // (P) behind the step's x where that is joined: what the product reads
  const S* h_prev;  // (Pp); zeros after a reset
  S* h;             // (Pp)
  S* h_tilde;       // (Hp), where there is a projection
  int64_t y;        // offset of its P values in y or y_half
};

template <class S, class W = S>
struct ForwardArgs {
  Sizes sizes;
  Schedule schedule;
  int directions;
  bool save;       // keep activated gates (and cells) for backward
  int64_t joined;  // values in front of each state in h, the last I of them the step's x, so that
                   // one product takes both; 0: x is projected ahead, a chunk at a time
  bool by_panel;   // of a single step: a panel of W_ih and one of W_hh in turn; else W_ih ahead
  bool from_end;   // the first step takes the panels from the last to the first, the next one back
  const S* zeros;  // (Sizes::zero_count)
  W* words;        // scratch: per thread, rows of x or of a state in words; unused where W is S
  int64_t words_stride;
  W* across;  // scratch: per thread, up to kMostAcross rows of x and of a state; or null
  int64_t across_stride;
  S* factors;  // scratch: per thread, the factors of those rows
  int64_t factors_stride;
  ForwardRow<S, Saved<S, W>>* rows;  // scratch: per thread, (B), one step's: those of its group; a
                                     // chunk's rows where states are known
  int64_t rows_stride;
  int64_t* group_rows;  // scratch: per thread, which of a chunk's rows are its group's; null where
  int64_t group_rows_stride;  // no team has groups
  ForwardDirection<S, W> direction[2];
};

// Like the weights; null: not wanted.
template <class S>
struct WeightGradients {
  S *dw_ih, *dw_hh, *db_ih, *db_hh, *dw_hr;
};

// Values of each of a direction's gradients, in the order of WeightGradients.
struct GradientSizes {
  int64_t w_ih, w_hh, b, w_hr;
  GradientSizes(Cell cell, const Sizes& s)
      : w_ih(gate_blocks(cell) * s.hidden * s.input),
        w_hh(gate_blocks(cell) * s.hidden * s.output),
        b(gate_blocks(cell) * s.hidden),
        w_hr(s.projected ? s.output * s.hidden : 0) {}
  int64_t all() const { return w_ih + w_hh + 2 * b + w_hr; }
};

template <class S, class E = S>
struct BackwardDirection {
  bool reverse;
  Chunk chunk;
  Weights<S, Word<E>> weights;
  PackedWeights<S, Word<E>> packed;
  const E* x;  // (io rows, I)
  const E* y;  // (io rows, y_stride)
  int64_t y_stride;
  const E* dy;  // (io rows, dy_stride), or null
  int64_t dy_stride;
  const E* gates;  // packed rows of the chunk, (., gates_stride)
  int64_t gates_stride;
  const S* cells;  // packed rows of the whole sequence, (., cells_stride)
  int64_t cells_stride;
  const E* h0;            // (B, Pp), sorted rows, zeros where not given
  const S* c0;            // (B, Hp), the same
  const S* dh_n;          // (B, Pp), sorted rows, or null
  E* dgates;              // packed rows of the chunk, (., dgates_stride): scratch
  int64_t dgates_stride;  // >= gradient blocks * Hp
  E* dgates_next;         // (B, dgates_stride), scratch: dgates of the step walked just before this
                          // chunk; null where there is one chunk
  S* carry;               // (state rows, Hp): LSTM dc, GRU dh z; holds dc_n or zeros at first
  E* dh;                  // packed rows of the chunk, (., Pp): dh before a projection; or null
  E* h_tilde;             // packed rows of the chunk, (., Hp); or null
  S *dh0, *dc0;           // (B, P), (B, H), caller's rows; or null: not wanted
  WeightGradients<S> results;         // written at the first chunk, added to at the others
  uint16_t *dw_ih_half, *dw_hh_half;  // of a single row: bfloat16, in place of dw_ih and dw_hh; or
                                      // null
  S* group_gradients;  // (groups - 1, group_gradients_stride): what later groups sum by themselves,
                       // scratch
  int* group_has_sum;  // (groups): whether a group has written there; zeros at first
  const uint8_t* reset;
};

// Where one row's step backward reads and writes, found once for all its tiles.
template <class S, class E>
struct BackwardRow {
  E* dgates;              // (gradient blocks, Hp)
  const E* dgates_after;  // (gradient blocks, Hp): of the step walked before; zeros where none
                          // reach this one
  const E* gates;         // (saved_blocks, Hp); LSTM, GRU
  const E* h;             // (Pp); GRU: h_prev, RNN: h
  const S *c_prev, *c;    // (Hp), LSTM
  const S* carried;       // (Hp): carry, or zeros where a reset follows; LSTM, GRU
  S* carry;               // (Hp); LSTM, GRU
  const E* dy;            // (P); zeros where there is none
  E* h_tilde;             // (Hp), or null; LSTM
};

template <class S, class E = S>
struct BackwardArgs {
  Sizes sizes;
  Schedule schedule;
  int directions;
  const S* zeros;           // (Sizes::zero_count)
  S* dx;                    // (io rows, I); or null: not wanted
  bool add_dx;              // dx holds zeros, or the other direction's share; else it is written
  BackwardRow<S, E>* rows;  // scratch: per thread, (B), one step's: those of its group
  int64_t rows_stride;
  const E** previous;  // scratch: where the states that entered a chunk's steps lie
  Word<E>* panels[2];  // scratch: x and those states as panels, k counting words of rows; of each
                       // group's rows where groups sum apart
  // Up to so many groups sum the weights' gradients over their own rows, apart from the others; 1:
  // none do.
  int apart_groups;
  int64_t group_gradients_stride;  // values of all gradients of a direction's weights, or more
  int64_t dgates_group_stride;  // from one group's dgates to the next one's, where they sum apart
  int64_t* group_rows;  // scratch: which of a chunk's rows are each group's, where they sum apart
  Word<E>* columns;  // scratch: per thread, (kMostGradientRows, column_words(words of chunk rows))
  int64_t columns_stride;
  BackwardDirection<S, E> direction[2];
};

// Words in front of a group's rows where groups sum apart and `before` rows are those of the groups
// before it: a word holds rows of one group alone. In front of one group more than there are: all.
template <class E>
constexpr int64_t words_before(int64_t before, int group) {
  return words_of<E>(before) + group;
}

// How many rows of a weight's gradient one thread works on at a time, at most.
inline constexpr int64_t kMostGradientRows = 32;

// Whole lines, and one more: columns a power of two apart would meet in few sets of the first
// cache.
constexpr int64_t column_words(int64_t words) { return padded(words) + kUnitAlignment; }

}  // namespace fusedrnn
