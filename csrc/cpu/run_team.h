// Running a team: OpenMP, and denormals flushed to zero while the kernels run.
#pragma once

#include <omp.h>

#if defined(__x86_64__)
  #include <xmmintrin.h>
#endif

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

// Runs body(slot) on every thread of a team. plan_for(threads) splits a team of that size; OpenMP
// may give fewer threads than asked for (a nested region, OMP_THREAD_LIMIT), so the plan is made
// for what it gave.
template <class PlanFor, class Body>
void run_team(int threads, int directions, const PlanFor& plan_for, const Body& body) {
  const Plan wish = plan_for(threads);
  Barriers barriers(wish.threads());
  if (wish.threads() == 1) {
    const FlushDenormals flush;
    body(slot_of(wish, 0, directions, barriers));
    return;
  }
#pragma omp parallel num_threads(wish.threads())
  {
    const int given = omp_get_num_threads();
    const Plan plan = given == wish.threads() ? wish : plan_for(given);
    const int thread = omp_get_thread_num();
    if (thread < plan.threads()) {
      const FlushDenormals flush;
      body(slot_of(plan, thread, directions, barriers));
    }
  }
}

}  // namespace fusedrnn
