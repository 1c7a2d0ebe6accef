// W v for a CTA's share of W, which stays in its registers and shared memory, and a v that all CTAs
// with the same rows of the batch make together, step by step, and hand each other through memory.
//
// The warps of a CTA share out k, 64 bytes of it at a time in turns: each gets its k of v straight
// into the registers that the tensor cores multiply (fragment_map.h; of floats a lane has half as
// many), and leaves its share of the sums in shared memory. Once the CTA has met, a thread adds the
// shares up, in a fixed order, for the units and rows that are its own.
//
// Rows of W are taken eight at a time: those of one gate of eight units. A tile of the tensor cores
// has two such halves, and so a lane all gates of a unit.
#pragma once

#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/fragment_map.h"
#include "cuda/steps.h"

namespace fusedrnn {

// Of the 255 that a thread has: for weights, sums and what is loaded, not counting its items'.
inline constexpr int kFreeRegisters = 200;

// How long a CTA may wait for the others before the kernel ends with an error: once they have
// begun, only a fault, or a debugger, keeps them. Until then it may be somebody else's kernel that
// holds their multiprocessors.
inline constexpr uint32_t kPatience = 10, kPatienceAtFirst = 600;  // of 2^30 nanoseconds

// Which units and rows are a CTA's and a thread's. CTAs of a side are numbered by the units first,
// by the rows next. A thread has kItems rows of one unit.
template <int kUnits, int kRows>
class PersistentShare {
 public:
  static constexpr int kThreads = kPersistentThreads;
  static constexpr int kItems = kUnits * kRows <= kThreads ? 1 : kUnits * kRows / kThreads;
  static_assert(kThreads % kUnits == 0 && kUnits * kRows % kWarp == 0);

  FUSEDRNN_D PersistentShare(int thread, int64_t index, int64_t hidden, const Exchange& exchange)
      : units_(static_cast<int>(persistent_units(hidden))),
        thread_(thread),
        first_unit_(static_cast<int>(index % (units_ / kUnits)) * kUnits),
        rows_before_(static_cast<int>(index / (units_ / kUnits)) * kRows),
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
// times kDepthBytes of a row of W. Its threads need kOwn registers more for each of their items.
template <class E, Precision kPrecision, int kGates, int kBlocks, int kUnits, int kDepths,
          int kRows, int kOwn>
class PersistentProduct {
  using Share = PersistentShare<kUnits, kRows>;
  static constexpr bool kExact = std::is_same_v<E, float> && kPrecision == Precision::kExact;
  static constexpr int kWarps = kPersistentThreads / kWarp;
  static constexpr int kHalf = 8;
  static constexpr int kTiles = kUnits * kGates / (2 * kHalf);
  static constexpr int kPerWord = 4 / sizeof(E);
  static constexpr int kDepthWords =
      kDepthBytes / 4;  // of k, that the four lanes of a group load at once
  // Rows of the batch: eight a tile, two tiles at once where the registers hold their sums, in
  // turns.
  static constexpr int kAtOnce =
      kRows == 8 || kTiles > (kExact ? 2 : 6) || (kTiles > 2 && kTiles * kDepths > 31) ? 1 : 2;
  static constexpr int kTurns = kRows / (8 * kAtOnce);
  static_assert(kUnits % (2 * kHalf) == 0 && kRows % (8 * kAtOnce) == 0);
  // A unit's sums, 16 bytes where there is more than one; rows lie so that the lanes of a store
  // take all banks.
  static constexpr int kWidth = kGates == 1 ? 1 : 4;
  static constexpr int kRowOfSums = (kUnits + 1) * kWidth;
  static constexpr int kSums = kRows * kRowOfSums;  // of one warp

  // Weights: 128 registers of them, the rest in shared memory.
  static constexpr int kHeld = kTiles * kDepths <= 16 ? kDepths : kTiles == 3 ? 4 : 16 / kTiles;
  static constexpr int kLaid = kDepths - kHeld;
  // Loads of v are waited for in groups, while those of the next are under way: as many as the
  // registers leave room for after the weights, the sums and all else.
  // Exact sums are several at a time, beside those that they are added to.
  static constexpr int kFree = kFreeRegisters - (kExact ? 40 : 0) - 8 * kTiles * kHeld -
                               4 * kTiles * kAtOnce - kOwn * Share::kItems;
  static constexpr int kRoom = kFree / (4 * kAtOnce);
  static constexpr int kGroup = kRoom >= kHeld && kLaid == 0 ? kHeld
                                : kRoom < 4                  ? 1
                                : kRoom < 8                  ? 2
                                                             : 4;
  static constexpr int kGroups = (kHeld + kGroup - 1) / kGroup;
  static_assert(kLaid == 0 || kHeld % kGroup == 0);

  using Loads = Words[kGroup][kAtOnce];

 public:
  static constexpr int kSharedBytes = 2 * kWarps * kSums * int{sizeof(float)} +
                                      kLaid * kTiles * 2 * kPersistentThreads * int{sizeof(Words)};

  // w: (kGates, U, kBlocks * U), U = share.units(). exchanged: the side's words of an Exchange.
  FUSEDRNN_D PersistentProduct(const Block& block, const Share& share, const E* w,
                               uint32_t* exchanged, int64_t batch)
      : block_(block),
        share_(share),
        lane_(lane_of(block.thread())),
        warp_(block.thread() / kWarp),
        depths_(row_words() / kDepthWords - warp_),
        words_(exchanged),
        batch_(batch) {
    FUSEDRNN_ONE_BY_ONE
    for (int s = kHeld; s < kDepths; ++s) {
      for_each_half([&](int t, int half) { *laid(t, s, half) = weights(w, t, half, s); });
    }
    for_each_half([&](int t, int half) {
      FUSEDRNN_UNROLL
      for (int s = 0; s < kHeld; ++s) w_[t][s][half] = weights(w, t, half, s);
    });
  }

  // Hands the other CTAs the value of v, of step i, that the thread's k-th item has in a block. All
  // threads together.
  FUSEDRNN_D void publish(int64_t i, int k, int block, float value) const {
    if (!share_.works()) return;
    const int column = block * share_.units() + share_.unit();
    uint32_t* to = words(i, share_.row(k)) + column / kPerWord;
    uint32_t word;
    if constexpr (std::is_same_v<E, float>) {
      word = bits_of(value);
      if (kPrecision == Precision::kTf32) word = block_.to_tf32(word);
      if (!share_.has_row(k)) return;
    } else {
      // Of the next unit, where this one is even.
      const float next = block_.of_lane_across(value, 1);
      if (block_.thread() % 2 != 0 || !share_.has_row(k)) return;
      E low, high;
      store(&low, value);
      store(&high, next);
      word = low.bits | uint32_t{high.bits} << 16;
    }
    block_.store_relaxed(to, publishable(word));
  }

  // This thread's share of the sums of step i, into one of two buffers, to be taken in turns. Waits
  // for all that the CTAs publish of it.
  FUSEDRNN_D void run(int64_t i, int buffer) const {
    const uint32_t* from =
        words(i, share_.first_row() + lane_.group) + warp_ * kDepthWords + 4 * lane_.quad;
    FUSEDRNN_ONE_BY_ONE
    for (int turn = 0; turn < kTurns; ++turn) {
      float c[kTiles][kAtOnce][4] = {};
      Loads v[2];
      get(v[0], from, turn, 0);
      FUSEDRNN_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        if (group + 1 < kGroups || kLaid > 0) {
          get(v[(group + 1) % 2], from, turn, (group + 1) * kGroup);
        }
        wait_for(v[group % 2], i, from, turn, group * kGroup);
        FUSEDRNN_UNROLL
        for (int s = group * kGroup; s < (group + 1) * kGroup && s < kHeld; ++s) {
          if (has(s)) multiply(c, v[group % 2][s - group * kGroup], held(s));
        }
      }
      if constexpr (kLaid > 0) add_laid(c, v[kGroups % 2], i, from, turn);
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

  template <class F>
  static FUSEDRNN_D void for_each_half(const F& f) {
    FUSEDRNN_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      f(t, 0);
      f(t, 1);
    }
  }

  // 16 bytes of a row of W.
  FUSEDRNN_D Words weights(const E* w, int t, int half, int s) const {
    if (!has(s)) return {};
    const int j = 2 * t + half;
    const int row = j % kGates * share_.units() + share_.first_unit() + j / kGates * kHalf;
    Words piece =
        *reinterpret_cast<const Words*>(reinterpret_cast<const uint32_t*>(w) +
                                        static_cast<int64_t>(row + lane_.group) * row_words() +
                                        (s * kWarps + warp_) * kDepthWords + 4 * lane_.quad);
    if constexpr (std::is_same_v<E, float> && kPrecision == Precision::kTf32) {
      FUSEDRNN_UNROLL
      for (uint32_t& word : piece.word) word = block_.to_tf32(word);
    }
    return piece;
  }

  FUSEDRNN_D int row_words() const { return kBlocks * share_.units() / kPerWord; }
  // Of k, the warp's s-th: those of all warps lie between two of them.
  FUSEDRNN_D bool has(int s) const { return s * kWarps < depths_; }
  FUSEDRNN_D uint32_t* words(int64_t i, int64_t row) const {
    return words_ + (i * batch_ + row) * row_words();
  }
  FUSEDRNN_D Sums* sums(int buffer, int warp, int row, int unit) const {
    float* to = reinterpret_cast<float*>(block_.shared());
    return reinterpret_cast<Sums*>(to + (buffer * kWarps + warp) * kSums + row * kRowOfSums +
                                   unit * kWidth);
  }
  // A thread's own weights in shared memory, 16 bytes beside those of the next thread.
  FUSEDRNN_D Words* laid(int t, int s, int half) const {
    return reinterpret_cast<Words*>(sums(2, 0, 0, 0)) +
           (((s - kHeld) * kTiles + t) * 2 + half) * kPersistentThreads + block_.thread();
  }

  // Rows beyond the last one, and k beyond the last, are zeros, and not waited for.
  FUSEDRNN_D Words get(const uint32_t* from, int turn, int s, int n) const {
    const int row = 8 * (turn * kAtOnce + n);
    if (!has(s) || !share_.has_row_of_cta(row + lane_.group)) return {};
    return block_.load_relaxed(from + row * row_words() + s * (kWarps * kDepthWords));
  }
  FUSEDRNN_D void get(Loads& v, const uint32_t* from, int turn, int first) const {
    FUSEDRNN_UNROLL
    for (int s = 0; s < kGroup; ++s) {
      FUSEDRNN_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        v[s][n] = first + s < kDepths ? get(from, turn, first + s, n) : Words{};
      }
    }
  }
  // What all have published of step 0 shows that all have begun.
  FUSEDRNN_D void wait_for(Loads& v, int64_t i, const uint32_t* from, int turn, int first) const {
    uint64_t since = 0;
    const bool all = await(
        reinterpret_cast<Words(&)[kGroup * kAtOnce]>(v),
        [&](int k) { return get(from, turn, first + k / kAtOnce, k % kAtOnce); },
        [&] {
          const uint64_t now = block_.nanoseconds();
          if (since == 0) since = now;
          const auto waited = static_cast<uint32_t>((now - since) >> 30);
          return waited > (i == 0 ? kPatienceAtFirst : kPatience);
        },
        [&](bool mine) { return block_.any_lane(mine); });
    if (!all) block_.give_up();
  }

  FUSEDRNN_D auto held(int s) const {
    return [this, s](int t, int half) -> const Words& { return w_[t][s][half]; };
  }

  // The depths whose weights lie in shared memory, of which `v` holds the first group.
  FUSEDRNN_D void add_laid(float (&c)[kTiles][kAtOnce][4], Loads& v, int64_t i,
                           const uint32_t* from, int turn) const {
    FUSEDRNN_ONE_BY_ONE
    for (int first = kGroups * kGroup; has(first) && first < kDepths; first += kGroup) {
      wait_for(v, i, from, turn, first);
      FUSEDRNN_UNROLL
      for (int s = 0; s < kGroup; ++s) {
        if (!has(first + s) || first + s >= kDepths) continue;
        multiply(c, v[s], [&](int t, int half) { return *laid(t, first + s, half); });
      }
      get(v, from, turn, first + kGroup);
    }
  }

  // weights(t, half): 16 bytes of a row of W.
  template <class Weights>
  FUSEDRNN_D void multiply(float (&c)[kTiles][kAtOnce][4], const Words (&v)[kAtOnce],
                           const Weights& weights) const {
    FUSEDRNN_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const Words low = weights(t, 0), high = weights(t, 1);
      FUSEDRNN_UNROLL
      for (int call = 0; call < 2; ++call) {
        const uint32_t a[4] = {low.word[2 * call], high.word[2 * call], low.word[2 * call + 1],
                               high.word[2 * call + 1]};
        FUSEDRNN_UNROLL
        for (int n = 0; n < kAtOnce; ++n) {
          multiply_add(c[t][n], a, v[n].word[2 * call], v[n].word[2 * call + 1]);
        }
      }
    }
  }
  FUSEDRNN_D void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                               uint32_t b1) const {
    if constexpr (kExact) {
      uint32_t head[4], tail[4];
      FUSEDRNN_UNROLL
      for (int i = 0; i < 4; ++i) {
        // Or the tails of all weights would be computed once, and take as many registers.
        head[i] = tf32_head(block_.unknown(a[i]));
        tail[i] = tf32_tail(block_.unknown(a[i]));
      }
      const uint32_t h0 = tf32_head(b0), h1 = tf32_head(b1);
      // Tensor cores cut off what their sum cannot hold, always towards zero, where an addition
      // rounds: one sum of all k would show that.
      float sum[4] = {};
      block_.multiply_add(E{}, sum, tail, h0, h1);
      block_.multiply_add(E{}, sum, head, tf32_tail(b0), tf32_tail(b1));
      block_.multiply_add(E{}, sum, head, h0, h1);
      FUSEDRNN_UNROLL
      for (int i = 0; i < 4; ++i) c[i] += sum[i];
    } else {
      block_.multiply_add(E{}, c, a, b0, b1);
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
  Words w_[kTiles][kHeld][2];
};

}  // namespace fusedrnn
