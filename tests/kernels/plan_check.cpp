// How calls are cut over threads, without torch: plans that depend on the distance of threads share
// hidden units alone, so that no bit depends on it, and use the fewer threads the farther these
// are; no plan has more threads than there are. Built and run by tests/test_kernels.py.
//
// Exit status 0: all plans are so, and some depend on the distance.
#include <cstdio>

#include "cpu/plan.h"

namespace fusedrnn {
namespace {

int failures = 0, plans = 0, dependent = 0;

void check(Workload work, int threads) {
  const bool depends = depends_on_distance(work, threads);
  dependent += depends;
  int parts = kMaxThreads;
  for (Distance d : {Distance::kNear, Distance::kUnknown, Distance::kFar}) {
    work.distance = d;
    const Plan plan = plan_team(work, threads);
    ++plans;
    const bool right =
        !depends || (plan.groups == 1 && plan.directions == 1 && plan.parts <= parts);
    if (!right || plan.threads() > threads) {
      ++failures;
      std::printf("cell %d B %ld H %ld pairs %ld threads %d distance %d\n",
                  static_cast<int>(work.cell), long(work.batch), long(work.sizes.hidden),
                  long(work.pairs), threads, static_cast<int>(d));
    }
    parts = plan.parts;
  }
}

}  // namespace
}  // namespace fusedrnn

int main() {
  using namespace fusedrnn;
  for (Cell cell : {Cell::kLstm, Cell::kGru, Cell::kRnnTanh}) {
    for (int64_t hidden : {16, 32, 64, 128, 256, 512}) {
      for (int64_t batch : {1, 2, 3, 4, 8, 64}) {
        for (int64_t steps : {1, 2, 20, 100}) {
          for (int directions : {1, 2}) {
            for (int products : {1, 3}) {
              const Sizes sizes = {hidden, hidden, hidden, false};
              for (int threads : {1, 2, 3, 4, 16}) {
                check({cell, sizes, directions, batch, steps * batch, 4, 4, products}, threads);
              }
            }
          }
        }
      }
    }
  }
  std::printf("%d plans, %d failures\n", plans, failures);
  return failures == 0 && dependent > 0 ? 0 : 1;
}
