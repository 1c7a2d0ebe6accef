// Running a team: OpenMP, and denormals flushed to zero while the kernels run.
#pragma once

#include <omp.h>
#include <sched.h>

#if defined(__x86_64__)
  #include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstdint>

#include "cpu/team.h"

namespace fusedrnn {

// Denormal operands slow products down by up to two orders of magnitude. The calling thread's mode
// comes back when the scope ends.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // FTZ | DAZ
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t{1} << 24)));  // FZ
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FlushDenormals() = default;
#endif
  FlushDenormals(const FlushDenormals&) = delete;
};

// The core that the calling thread runs on; -1 where the system does not tell.
inline int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves the calling thread off `core`, if it runs there and there are as many cores as `threads`;
// its affinity is the same afterwards. Linux may wake a thread on the core of the one that wakes
// it while others idle, above all in a virtual machine after a pause. The two would then take turns
// for milliseconds.
inline void leave_core([[maybe_unused]] int core, [[maybe_unused]] int threads) {
#if defined(__linux__)
  if (current_core() != core) return;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || CPU_COUNT(&allowed) < threads) return;
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  if (sched_setaffinity(0, sizeof(others), &others) == 0) {
    sched_setaffinity(0, sizeof(allowed), &allowed);
  }
#endif
}

// Runs body(slot) on every thread of a plan. plan_for(threads) splits a team of that size; OpenMP
// may give fewer threads than asked for (a nested region, OMP_THREAD_LIMIT), so the plan is made
// for what it gave. `threads`, torch's number, is always asked for, however few the plan needs:
// libgomp ends the threads that a smaller team leaves out, and torch's next region starts them
// anew.
template <class PlanFor, class Body>
void run_team(int threads, int directions, const PlanFor& plan_for, const Body& body) {
  const Plan wish = plan_for(threads);
  Barriers barriers(wish.threads());
  if (wish.threads() == 1) {
    const FlushDenormals flush;
    body(slot_of(wish, 0, directions, barriers));
    return;
  }
  const int callers_core = current_core();
#pragma omp parallel num_threads(threads)
  {
    const int given = omp_get_num_threads();
    const Plan plan = given == threads ? wish : plan_for(std::min(given, wish.threads()));
    const int thread = omp_get_thread_num();
    if (thread < plan.threads()) {
      if (thread > 0) leave_core(callers_core, given);
      const FlushDenormals flush;
      body(slot_of(plan, thread, directions, barriers));
    }
  }
}

}  // namespace fusedrnn
