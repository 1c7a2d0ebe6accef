// Which values of a product each thread of a warp holds: mma.m16n8k16 of the PTX ISA, with k
// permuted.
//
// A lane is 4 * group + quad. Of a tile of W (16 units, 32 k) it holds units `group` and
// `group + 8`, k 8 quad to 8 quad + 7: 16 bytes that lie together in a row of W. The instruction
// takes 16 k at a time and does not care which, as long as W and h agree: its first call gets the
// lane's first four, its second the others. Of floats, which m16n8k8 takes, 16 bytes are four k,
// and the rest is the same.
//
// Columns of h are rows of the batch. A warp has two of them and fills the eight columns with both
// in turn: then every lane is left with the same four sums as the three others of its group, and
// takes the one that is its own.
#pragma once

#include "isa_namespace.h"

namespace fusedrnn {

inline constexpr int kWarp = 32, kTileUnits = 16, kTileDepth = 32, kTileRows = 2;

struct Lane {
  int group, quad;
};
FUSEDRNN_HD constexpr Lane lane_of(int thread) { return {thread % kWarp / 4, thread % 4}; }

// Of a tile: the k of the first of the eight values that a lane holds.
FUSEDRNN_HD constexpr int lane_depth(Lane lane) { return 8 * lane.quad; }
// The batch row whose state the lane loads.
FUSEDRNN_HD constexpr int loaded_row(Lane lane) { return lane.group % kTileRows; }

// Of the four sums c[4] that an instruction leaves: the unit of the tile and the batch row.
FUSEDRNN_HD constexpr int sum_unit(Lane lane, int sum) { return lane.group + 8 * (sum / 2); }
FUSEDRNN_HD constexpr int sum_row(int sum) { return sum % kTileRows; }
// The sum that a lane takes.
FUSEDRNN_HD constexpr int own_sum(Lane lane) { return lane.quad; }

namespace fragment_map_proof {

// Every (unit, batch row) of a tile belongs to exactly one lane.
constexpr bool shares_out_sums() {
  bool seen[kTileUnits][kTileRows] = {};
  for (int thread = 0; thread < kWarp; ++thread) {
    const Lane lane = lane_of(thread);
    bool& mine = seen[sum_unit(lane, own_sum(lane))][sum_row(own_sum(lane))];
    if (mine) return false;
    mine = true;
  }
  return true;
}

// Column 2 quad + i of a sum is one that was loaded with the row that sum_row() names.
constexpr bool columns_agree() {
  for (int quad = 0; quad < 4; ++quad) {
    for (int sum = 0; sum < 4; ++sum) {
      const int column = 2 * quad + sum % 2;  // PTX ISA: of c[sum]
      if (loaded_row({column, 0}) != sum_row(sum)) return false;
    }
  }
  return true;
}

// Every (unit, k) of a tile of W is held exactly once.
constexpr bool shares_out_weights() {
  bool seen[kTileUnits][kTileDepth] = {};
  for (int thread = 0; thread < kWarp; ++thread) {
    const Lane lane = lane_of(thread);
    for (int unit = lane.group; unit < kTileUnits; unit += 8) {
      for (int i = 0; i < 8; ++i) {
        bool& mine = seen[unit][lane_depth(lane) + i];
        if (mine) return false;
        mine = true;
      }
    }
  }
  return true;
}

static_assert(shares_out_sums() && columns_agree() && shares_out_weights());

}  // namespace fragment_map_proof

}  // namespace fusedrnn
