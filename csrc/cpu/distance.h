// How far apart the threads of the caller's team run just now: whether short work gains from two.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "cpu/plan.h"

namespace fusedrnn {

// Whether calls follow each other so closely that a second thread helps a short one too: after some
// milliseconds OpenMP's threads sleep, and to wake them takes longer than the call.
class Pace {
 public:
  using Clock = std::chrono::steady_clock;

  // Notes a call; true from the kFew-th on that came in time.
  bool note_call(Clock::time_point now) {
    in_time_ = now - last_ < std::chrono::milliseconds(5) ? in_time_ + 1 : 0;
    last_ = now;
    return in_time_ >= kFew;
  }

 private:
  static constexpr int64_t kFew = 8;
  Clock::time_point last_{};
  int64_t in_time_ = 0;
};

// Between the first two of the calling thread's `threads` threads, measured once in a millisecond
// of calls that follow each other; unknown where they do not.
Distance team_distance(int threads);

// For tests: from now on team_distance() finds "near" or "far"; "measured": what it measures.
void assume_threads(const std::string& distance);

// Sets work.distance where the plan for so many threads depends on it.
void find_distance(Workload& work, int threads);

}  // namespace fusedrnn
