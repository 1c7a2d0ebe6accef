// W v for a CTA's share of W, which stays in its registers, and a v that all CTAs with the same
// rows of the batch make together, step by step, and hand each other through memory.
//
// The warps of a CTA share out k, 32 at a time in turns: each gets its k of v straight into the
// registers that the tensor cores multiply (fragment_map.h), and leaves its share of the sums in
// shared memory. Once the CTA has met, a thread adds the shares up, in a fixed order, for the units
// and rows that are its own.
//
// Rows of W are taken eight at a time: those of one gate of eight units. A tile of the tensor cores
// has two such halves, and so a lane all gates of a unit.
#pragma once

#include "cuda/block.cuh"
#include "cuda/fragment_map.h"
#include "cuda/steps.h"

namespace fusedrnn {

inline constexpr int kPersistentThreads = 256;

// Of the 255 that a thread has: for weights, sums and what is loaded, not counting its items'.
inline constexpr int kFreeRegisters = 200;

// How long a CTA may wait for the others before the kernel ends with an error: they are resident,
// so that only a fault, or a debugger, keeps them.
inline constexpr uint64_t kPatience = 10'000'000'000;  // nanoseconds

// Which units and rows are a CTA's and a thread's. CTAs are numbered by the units first, by the
// rows next. A thread has kItems rows of one unit.
template <int kUnits, int kRows>
class PersistentShare {
 public:
  static constexpr int kThreads = kPersistentThreads;
  static constexpr int kItems = kUnits * kRows <= kThreads ? 1 : kUnits * kRows / kThreads;
  static_assert(kThreads % kUnits == 0 && kUnits * kRows % kWarp == 0);

  FUSEDRNN_D PersistentShare(const Block& block, int64_t hidden, const Exchange& exchange)
      : units_(static_cast<int>(persistent_units(hidden))),
        thread_(block.thread()),
        first_unit_(static_cast<int>(block.index() % (units_ / kUnits)) * kUnits),
        rows_before_(static_cast<int>(block.index() / (units_ / kUnits)) * kRows),
        first_row_(exchange.first_row + rows_before_),
        rows_(exchange.rows - rows_before_) {}

  FUSEDRNN_D int units() const { return units_; }  // of all CTAs
  FUSEDRNN_D int first_unit() const { return first_unit_; }
  FUSEDRNN_D int64_t first_row() const { return first_row_; }
  FUSEDRNN_D bool has_row_of_cta(int row) const { return row < rows_; }

  // Whether the thread has items at all: whole warps have none where there are too few.
  FUSEDRNN_D bool works() const { return thread_ < kUnits * kRows; }
  FUSEDRNN_D int unit() const { return first_unit_ + unit_of_cta(); }
  FUSEDRNN_D int64_t row(int k) const { return first_row_ + row_of_cta(k); }
  FUSEDRNN_D int unit_of_cta() const { return thread_ % kUnits; }
  FUSEDRNN_D int row_of_cta(int k) const { return thread_ / kUnits + k * (kThreads / kUnits); }
  FUSEDRNN_D bool has_row(int k) const { return has_row_of_cta(row_of_cta(k)); }

 private:
  const int units_, thread_, first_unit_, rows_before_;
  const int64_t first_row_;
  const int rows_;  // of the CTA and all after it
};

// v has kBlocks blocks of units, one value each; W kGates rows a unit. A warp has at most kDepths
// times 32 columns of W. Its threads need kOwn registers more for each of their items.
template <class E, int kGates, int kBlocks, int kUnits, int kDepths, int kRows, int kOwn>
class PersistentProduct {
  using Share = PersistentShare<kUnits, kRows>;
  static constexpr int kWarps = kPersistentThreads / kWarp;
  static constexpr int kHalf = 8;
  static constexpr int kTiles = kUnits * kGates / (2 * kHalf);
  // Rows of the batch: eight a tile, two tiles at once, in turns.
  static constexpr int kAtOnce = kRows == 8 ? 1 : 2;
  static constexpr int kTurns = kRows / (8 * kAtOnce);
  static_assert(kUnits % (2 * kHalf) == 0 && kRows % (8 * kAtOnce) == 0);
  // A unit's sums, 16 bytes where there is more than one; rows lie so that the lanes of a store
  // take all banks.
  static constexpr int kWidth = kGates == 1 ? 1 : 4;
  static constexpr int kRowOfSums = (kUnits + 1) * kWidth;
  static constexpr int kSums = kRows * kRowOfSums;  // of one warp
  // Loads under way beside those that are multiplied: as many as the registers leave room for,
  // after the weights, the sums and all else.
  static constexpr int kFree =
      kFreeRegisters - 8 * kTiles * kDepths - 4 * kTiles * kAtOnce - kOwn * Share::kItems;
  static constexpr int kRoom = kFree / (4 * kAtOnce) - 1;
  static constexpr int kAhead = kRoom < 1 ? 1 : kRoom < kDepths ? kRoom : kDepths;

 public:
  static constexpr int kSharedBytes = 2 * kWarps * kSums * int{sizeof(float)};

  // w: (kGates, U, kBlocks * U), U = share.units().
  FUSEDRNN_D PersistentProduct(const Block& block, const Share& share, const E* w,
                               const Exchange& exchange, int64_t batch)
      : block_(block),
        share_(share),
        lane_(lane_of(block.thread())),
        warp_(block.thread() / kWarp),
        depths_(kBlocks * share.units() / kTileDepth - warp_),
        words_(exchange.words),
        batch_(batch) {
    FUSEDRNN_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      FUSEDRNN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int j = 2 * t + half;
        const int row = j % kGates * share.units() + share.first_unit() + j / kGates * kHalf;
        const E* from = w + static_cast<int64_t>(row + lane_.group) * width() + lane_depth(lane_);
        FUSEDRNN_UNROLL
        for (int s = 0; s < kDepths; ++s) {
          Words piece = {};
          if (has(s)) piece = *reinterpret_cast<const Words*>(from + depth(s) * kTileDepth);
          FUSEDRNN_UNROLL
          for (int call = 0; call < 2; ++call) {
            w_[t][s][call][half] = piece.word[2 * call];
            w_[t][s][call][half + 2] = piece.word[2 * call + 1];
          }
        }
      }
    }
  }

  // Hands the other CTAs the value of v, of step i, that the thread's k-th item has in a block. All
  // threads together.
  FUSEDRNN_D void publish(int64_t i, int k, int block, float value) const {
    if (!share_.works()) return;
    const float next = block_.of_lane_across(value, 1);  // of the next unit, where this one is even
    if (block_.thread() % 2 != 0 || !share_.has_row(k)) return;
    E low, high;
    store(&low, value);
    store(&high, next);
    block_.store_relaxed(words(i, share_.row(k), block * share_.units() + share_.unit()),
                         publishable(low.bits | uint32_t{high.bits} << 16));
  }

  // This thread's share of the sums of step i, into one of two buffers, to be taken in turns. Waits
  // for all that the CTAs publish of it.
  FUSEDRNN_D void run(int64_t i, int buffer) const {
    const uint32_t* from =
        words(i, share_.first_row() + lane_.group, warp_ * kTileDepth + lane_depth(lane_));
    FUSEDRNN_ONE_BY_ONE
    for (int turn = 0; turn < kTurns; ++turn) {
      float c[kTiles][kAtOnce][4] = {};
      Words v[kDepths][kAtOnce];
      FUSEDRNN_UNROLL
      for (int s = 0; s < kAhead; ++s) get(v[s], from, turn, s);
      FUSEDRNN_UNROLL
      for (int s = 0; s < kDepths; ++s) {
        if (s + kAhead < kDepths) get(v[s + kAhead], from, turn, s + kAhead);
        if (!has(s)) continue;
        wait_for(v[s], from, turn, s);
        multiply(c, s, v[s]);
      }
      leave(c, buffer, turn);
    }
  }

  // The sums of the thread's k-th item, once the CTA has met.
  FUSEDRNN_D void add_up(int buffer, int k, float (&to)[kGates]) const {
    FUSEDRNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) to[gate] = 0;
    if (!share_.works()) return;
    FUSEDRNN_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) {
      const Sums s = *sums(buffer, warp, share_.row_of_cta(k), share_.unit_of_cta());
      FUSEDRNN_UNROLL
      for (int gate = 0; gate < kGates; ++gate) to[gate] += s.gate[gate];
    }
  }

 private:
  struct alignas(4 * kWidth) Sums {
    float gate[kWidth];
  };

  FUSEDRNN_D int width() const { return kBlocks * share_.units(); }
  FUSEDRNN_D int depth(int s) const { return s * kWarps + warp_; }
  FUSEDRNN_D bool has(int s) const { return s * kWarps < depths_; }
  FUSEDRNN_D uint32_t* words(int64_t i, int64_t row, int column) const {
    return words_ + (i * batch_ + row) * (width() / 2) + column / 2;
  }
  FUSEDRNN_D Sums* sums(int buffer, int warp, int row, int unit) const {
    float* to = reinterpret_cast<float*>(block_.shared());
    return reinterpret_cast<Sums*>(to + (buffer * kWarps + warp) * kSums + row * kRowOfSums +
                                   unit * kWidth);
  }

  // Rows beyond the last one are zeros, and not waited for.
  FUSEDRNN_D Words get(const uint32_t* from, int turn, int s, int n) const {
    const int row = 8 * (turn * kAtOnce + n);
    if (!share_.has_row_of_cta(row + lane_.group)) return {};
    return block_.load_relaxed(from + row * (width() / 2) + s * (kWarps * kTileDepth / 2));
  }
  FUSEDRNN_D void get(Words (&v)[kAtOnce], const uint32_t* from, int turn, int s) const {
    FUSEDRNN_UNROLL
    for (int n = 0; n < kAtOnce; ++n) v[n] = has(s) ? get(from, turn, s, n) : Words{};
  }
  FUSEDRNN_D void wait_for(Words (&v)[kAtOnce], const uint32_t* from, int turn, int s) const {
    uint64_t since = 0;
    const bool all = await(
        v, [&](int n) { return get(from, turn, s, n); },
        [&] {
          const uint64_t now = block_.nanoseconds();
          if (since == 0) since = now;
          return now - since > kPatience;
        },
        [&](bool mine) { return block_.any_lane(mine); });
    if (!all) block_.give_up();
  }

  FUSEDRNN_D void multiply(float (&c)[kTiles][kAtOnce][4], int s, const Words (&v)[kAtOnce]) const {
    FUSEDRNN_UNROLL
    for (int n = 0; n < kAtOnce; ++n) {
      FUSEDRNN_UNROLL
      for (int call = 0; call < 2; ++call) {
        FUSEDRNN_UNROLL
        for (int t = 0; t < kTiles; ++t) {
          block_.multiply_add(E{}, c[t][n], w_[t][s][call], v[n].word[2 * call],
                              v[n].word[2 * call + 1]);
        }
      }
    }
  }

  FUSEDRNN_D void leave(const float (&c)[kTiles][kAtOnce][4], int buffer, int turn) const {
    FUSEDRNN_UNROLL
    for (int n = 0; n < kAtOnce; ++n) {
      FUSEDRNN_UNROLL
      for (int column = 0; column < 2; ++column) {
        const int row = 8 * (turn * kAtOnce + n) + 2 * lane_.quad + column;
        FUSEDRNN_UNROLL
        for (int b = 0; b < kUnits / kHalf; ++b) {
          Sums s{};
          FUSEDRNN_UNROLL
          for (int gate = 0; gate < kGates; ++gate) {
            const int j = b * kGates + gate;
            s.gate[gate] = c[j / 2][n][2 * (j % 2) + column];
          }
          *sums(buffer, warp_, row, kHalf * b + lane_.group) = s;
        }
      }
    }
  }

  const Block& block_;
  const Share& share_;
  const Lane lane_;
  const int warp_;
  const int depths_;  // of k, from the warp's first on
  uint32_t* const words_;
  const int64_t batch_;
  uint32_t w_[kTiles][kDepths][2][4];
};

}  // namespace fusedrnn
