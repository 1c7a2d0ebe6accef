// W v for a W that stays in a CTA: in its registers, and what does not fit there in its shared
// memory.
//
// W is (kTiles, kUnits, kBlocks, kUnits), aligned to 16 bytes: forward W_hh (kTiles gates, one
// block), in back-propagation its transpose (one tile, kBlocks gates), with zeros for the units
// beyond hidden_size. A CTA has kRows rows of the batch, a thread one row and one unit: it hands in
// that unit's values of v (put), meets the others at a barrier, and gets that unit's sums, one a
// tile (run). v has two buffers, taken in turns: one barrier between put and run is enough.
//
// Sums are float32 in a fixed order.
#pragma once

#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/fragment_map.h"

namespace fusedrnn {

// 16 bytes, the widest load.
template <class V>
struct alignas(16) Piece {
  V value[16 / sizeof(V)];
};

template <class V>
FUSEDRNN_D Piece<V> piece_of(const void* aligned) {
  return *static_cast<const Piece<V>*>(aligned);
}

// ---- half precision, on tensor cores ------------------------------------------------------------

// A warp has 16 units, with all of their gates and the whole of k: no sum crosses a warp.
template <class E, int kTiles, int kBlocks, int kUnits>
class MmaProduct {
 public:
  static constexpr int kRows = kTileRows;
  static constexpr int kThreads = kUnits / kTileUnits * kWarp;
  static constexpr int kSharedBytes = 2 * kRows * (kBlocks * kUnits + 32) * int{sizeof(E)};

  FUSEDRNN_D MmaProduct(const Block& block, const E* w)
      : block_(block), lane_(lane_of(block.thread())) {
    const int first = block.thread() / kWarp * kTileUnits + lane_.group;
    FUSEDRNN_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      FUSEDRNN_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        FUSEDRNN_UNROLL
        for (int s = 0; s < kDepths; ++s) {
          const E* from = w + ((t * kUnits + first) * kBlocks + b) * kUnits + s * kTileDepth +
                          lane_depth(lane_);
          const auto low = piece_of<uint32_t>(from);
          const auto high = piece_of<uint32_t>(from + 8 * kBlocks * kUnits);
          FUSEDRNN_UNROLL
          for (int half = 0; half < 2; ++half) {
            uint32_t (&a)[4] = w_[t][b][s][half];
            a[0] = low.value[2 * half];
            a[1] = high.value[2 * half];
            a[2] = low.value[2 * half + 1];
            a[3] = high.value[2 * half + 1];
          }
        }
      }
    }
  }

  FUSEDRNN_D int row() const { return sum_row(own_sum(lane_)); }
  FUSEDRNN_D int unit() const {
    return block_.thread() / kWarp * kTileUnits + sum_unit(lane_, own_sum(lane_));
  }
  // Whether no other thread has this one's row and unit.
  FUSEDRNN_D bool is_owner() const { return true; }

  FUSEDRNN_D void put(int buffer, int block, float value) const {
    store(vector(buffer, row()) + block * kUnits + unit(), value);
  }

  FUSEDRNN_D void run(int buffer, float (&sums)[kTiles]) const {
    float c[kTiles][kBlocks][4] = {};
    const E* from = vector(buffer, loaded_row(lane_)) + lane_depth(lane_);
    FUSEDRNN_UNROLL
    for (int s = 0; s < kDepths; ++s) {
      FUSEDRNN_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        const auto v = piece_of<uint32_t>(from + b * kUnits + s * kTileDepth);
        FUSEDRNN_UNROLL
        for (int half = 0; half < 2; ++half) {
          FUSEDRNN_UNROLL
          for (int t = 0; t < kTiles; ++t) {
            block_.multiply_add(E{}, c[t][b], w_[t][b][s][half], v.value[2 * half],
                                v.value[2 * half + 1]);
          }
        }
      }
    }
    const int own = own_sum(lane_);
    FUSEDRNN_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      sums[t] = 0;
      FUSEDRNN_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        const float (&d)[4] = c[t][b];
        sums[t] += own < 2 ? (own == 0 ? d[0] : d[1]) : own == 2 ? d[2] : d[3];
      }
    }
  }

 private:
  static constexpr int kDepths = kUnits / kTileDepth;
  // 64 bytes more than a multiple of 128: the two rows' loads do not share banks.
  static constexpr int kStride = kBlocks * kUnits + 32;

  FUSEDRNN_D E* vector(int buffer, int row) const {
    return reinterpret_cast<E*>(block_.shared()) + (buffer * kRows + row) * kStride;
  }

  const Block& block_;
  const Lane lane_;
  uint32_t w_[kTiles][kBlocks][kDepths][2][4];
};

// ---- float32 ------------------------------------------------------------------------------------

// One row of the batch. kLanes threads share out k, in turns of four values, for kSums rows of W:
// the gates of one unit forward, the only gate of four units in back-propagation; so that a value
// of v is loaded once for several products.
template <int kTiles, int kBlocks, int kUnits>
class FmaProduct {
 public:
  static constexpr int kRows = 1;
  static constexpr int kThreads = 256;

 private:
  static constexpr int kAcross = kBlocks > 1 ? 4 : 1;  // units of a thread
  static constexpr int kSums = kTiles * kAcross;
  static constexpr int kLanes = kThreads * kAcross / kUnits;
  static constexpr int kTurn = 4 * kLanes;
  static constexpr int kTurns = kBlocks * kUnits / kTurn;  // a thread has 4 values of each
  // For weights, beside all else that a thread needs: 255 are all there are.
  static constexpr int kRegisters = 192;
  static constexpr int kHeld = kTurns * kSums * 4 <= kRegisters ? kTurns : kRegisters / (kSums * 4);
  static_assert(kUnits % kTurn == 0 || kTurn % kUnits == 0);
  static_assert(kLanes <= kWarp && kBlocks * kUnits % kTurn == 0);

 public:
  static constexpr int kSharedBytes =
      (2 * kBlocks * kUnits + (kTurns - kHeld) * kSums * 4 * kThreads) * int{sizeof(float)};

  FUSEDRNN_D FmaProduct(const Block& block, const float* w)
      : block_(block), lane_(block.thread() % kLanes) {
    FUSEDRNN_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      FUSEDRNN_UNROLL
      for (int sum = 0; sum < kSums; ++sum) {
        // The next tile's row of the same unit, or the next unit's.
        const int row = first_unit() + sum * (kAcross > 1 ? 1 : kUnits);
        const auto p = piece_of<float>(w + row * kBlocks * kUnits + turn * kTurn + 4 * lane_);
        if (turn < kHeld) {
          w_[turn][sum] = p;
        } else {
          *beyond(turn, sum) = p;
        }
      }
    }
  }

  FUSEDRNN_D int row() const { return 0; }
  FUSEDRNN_D int unit() const { return first_unit() + lane_ % kAcross; }
  FUSEDRNN_D bool is_owner() const { return lane_ < kAcross; }

  FUSEDRNN_D void put(int buffer, int block, float value) const {
    if (is_owner()) vector(buffer)[block * kUnits + unit()] = value;
  }

  FUSEDRNN_D void run(int buffer, float (&sums)[kTiles]) const {
    float c[kSums] = {};
    const float* v = vector(buffer) + 4 * lane_;
    FUSEDRNN_UNROLL
    for (int turn = 0; turn < kHeld; ++turn) {
      add(c, w_[turn], piece_of<float>(v + turn * kTurn));
    }
    // One by one: all at once they would take the registers of the others.
    FUSEDRNN_ONE_BY_ONE
    for (int turn = kHeld; turn < kTurns; ++turn) {
      Piece<float> w[kSums];
      FUSEDRNN_UNROLL
      for (int sum = 0; sum < kSums; ++sum) w[sum] = *beyond(turn, sum);
      add(c, w, piece_of<float>(v + turn * kTurn));
    }
    FUSEDRNN_UNROLL
    for (int mask = 1; mask < kLanes; mask *= 2) {
      FUSEDRNN_UNROLL
      for (int sum = 0; sum < kSums; ++sum) c[sum] += block_.of_lane_across(c[sum], mask);
    }
    if constexpr (kAcross == 1) {
      FUSEDRNN_UNROLL
      for (int t = 0; t < kTiles; ++t) sums[t] = c[t];
    } else {
      const int own = lane_ % kAcross;
      sums[0] = own < 2 ? (own == 0 ? c[0] : c[1]) : own == 2 ? c[2] : c[3];
    }
  }

 private:
  FUSEDRNN_D int first_unit() const { return block_.thread() / kLanes * kAcross; }
  FUSEDRNN_D float* vector(int buffer) const {
    return reinterpret_cast<float*>(block_.shared()) + buffer * kBlocks * kUnits;
  }
  static FUSEDRNN_D void add(float (&c)[kSums], const Piece<float> (&w)[kSums],
                             const Piece<float>& v) {
    FUSEDRNN_UNROLL
    for (int sum = 0; sum < kSums; ++sum) {
      FUSEDRNN_UNROLL
      for (int i = 0; i < 4; ++i) c[sum] += w[sum].value[i] * v.value[i];
    }
  }
  // A thread's own weights in shared memory, 16 bytes beside those of the next thread.
  FUSEDRNN_D Piece<float>* beyond(int turn, int sum) const {
    return reinterpret_cast<Piece<float>*>(vector(2)) + ((turn - kHeld) * kSums + sum) * kThreads +
           block_.thread();
  }

  const Block& block_;
  const int lane_;
  Piece<float> w_[kHeld][kSums];
};

template <class E, int kTiles, int kBlocks, int kUnits>
using Product = std::conditional_t<std::is_same_v<E, float>, FmaProduct<kTiles, kBlocks, kUnits>,
                                   MmaProduct<E, kTiles, kBlocks, kUnits>>;

}  // namespace fusedrnn
