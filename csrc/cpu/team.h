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

// Spins for a bounded time, then gives up the core at each turn: a spinning thread would otherwise
// starve the one it waits for when there are more threads than cores.
class alignas(64) Barrier {
 public:
  void wait(int threads) {
    if (threads <= 1) return;
    const uint32_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;  // some 50 us

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
};

inline constexpr int kMaxThreads = 256;

// A thread alone waits for nobody.
struct Barriers {
  explicit Barriers(int threads) : group(threads > 1 ? threads : 0) {}
  Barrier team;
  std::vector<Barrier> group;
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
  Barrier* team;
  Barrier* group_barrier;  // of this thread's parts

  void wait_team() const { team->wait(threads); }
  void wait_parts() const { group_barrier->wait(parts); }
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
  slot.team = &barriers.team;
  slot.group_barrier =
      barriers.group.empty() ? &barriers.team : &barriers.group[direction * plan.groups + group];
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
