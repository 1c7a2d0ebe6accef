// Who does what: the threads of one call, how the work is split over them, and their barriers.
//
// A team of threads is split by direction, then into groups of batch rows, then each group into
// parts of the hidden units. Groups never wait for each other inside a time step; the parts of a
// group meet at a barrier after each step, since every unit needs all of h.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace fusedrnn {

// How often a thread has arrived at a barrier; its own line, which it alone writes: the others hear
// of it in one transfer between two cores.
struct alignas(128) Arrivals {
  std::atomic<uint32_t> count{0};
};

// Waits at the barrier of `threads` threads as its index-th. Spins for a bounded time, then gives
// up the core at each turn: a spinning thread would otherwise starve the one it waits for when
// there are more threads than cores. At the first barrier that one may not have woken yet.
inline void wait_for_all(Arrivals* arrivals, int threads, int index) {
  if (threads <= 1) return;
  const auto pause = [] {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  };
  const uint32_t turn = arrivals[index].count.load(std::memory_order_relaxed) + 1;
  const int most_spins = turn == 1 ? 200 : 2000;  // some 5 or 50 us
  arrivals[index].count.store(turn, std::memory_order_release);
  int spins = 0;
  for (int i = 0; i < threads; ++i) {
    // Who is not behind may be ahead, at the next barrier already.
    while (static_cast<int32_t>(arrivals[i].count.load(std::memory_order_acquire) - turn) < 0) {
      if (++spins < most_spins) {
        pause();
      } else {
        sched_yield();
      }
    }
  }
}

inline constexpr int kMaxThreads = 256;

// Of a team and of its groups' parts, by thread. A thread alone waits for nobody.
struct Barriers {
  explicit Barriers(int threads) : team(threads > 1 ? threads : 0), parts(team.size()) {}
  std::vector<Arrivals> team, parts;
};

// How a team is split. directions * groups * parts <= threads; the rest of the team idles.
struct Plan {
  int directions = 1;  // 2: the two directions side by side
  int groups = 1;      // batch rows
  int parts = 1;       // hidden units
  int threads() const { return directions * groups * parts; }
};

// One thread's place in the plan.
struct Slot {
  int thread, threads;  // within the team
  int direction_begin, direction_end;
  int group, groups;
  int part, parts;
  Arrivals* team;         // (threads)
  Arrivals* group_parts;  // (parts), of this thread's group

  void wait_team() const { wait_for_all(team, threads, thread); }
  void wait_parts() const { wait_for_all(group_parts, parts, part); }
};

inline Slot slot_of(const Plan& plan, int thread, int directions, Barriers& barriers) {
  const int per_direction = plan.groups * plan.parts;
  const int direction = thread / per_direction;
  const int group = thread % per_direction / plan.parts;
  Slot slot{};
  slot.thread = thread;
  slot.threads = plan.threads();
  slot.direction_begin = plan.directions == 2 ? direction : 0;
  slot.direction_end = plan.directions == 2 ? direction + 1 : directions;
  slot.group = group;
  slot.groups = plan.groups;
  slot.part = thread % plan.parts;
  slot.parts = plan.parts;
  slot.team = barriers.team.data();
  slot.group_parts = barriers.parts.data() + (thread - slot.part);
  return slot;
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The index-th of `count` nearly equal shares of [0, n).
inline Range share(int64_t n, int index, int count) {
  return {n * index / count, n * (index + 1) / count};
}

}  // namespace fusedrnn
