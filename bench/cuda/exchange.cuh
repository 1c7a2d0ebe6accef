// The loop that every exchange is measured in: make a share of a step's words, get all of them,
// and let the next step depend on it.
#pragma once

#include <cstdint>
#include <string>

#include "asm.cuh"
#include "probe.cuh"

namespace fusedrnn::probe {

inline constexpr uint32_t kTop = 0x80000000u;  // set in no word that is sent, and in kUnwritten
inline constexpr uint64_t kKernelNanoseconds = 500000000;  // what a kernel may wait in all
inline constexpr int kMaxSteps = 4096, kMaxPayloadWords = 16384, kMaxGroups = 32;

// What goes wrong on the device, counted.
struct Trouble {
  uint32_t late;                          // threads that ran out of time
  uint32_t wrong;                         // words that were not what they should be, or not there
  uint32_t step, index, found, expected;  // of one of them
};

// One launch. `groups` groups of `ctas` CTAs each exchange among themselves.
struct Task {
  uint32_t* words;     // (groups, steps, payload_words), kUnwritten before each launch
  uint32_t* counters;  // (groups, 32): one a group, each on a line of its own; 0 before each launch
  uint32_t* sums;      // (groups * ctas, kThreads): of the words that each thread got
  Trouble* trouble;    // one
  uint32_t ctas, groups, steps, payload_words;
  uint32_t own_bits;  // a CTA of a cluster makes 2^own_bits pieces
  bool verify;        // compare every word with what it should be
};

// Any two words differ: 5 bits of the group, 12 of the step, 14 of the index.
static_assert(kMaxGroups <= 1 << 5 && kMaxSteps <= 1 << 12 && kMaxPayloadWords <= 1 << 14);
__device__ inline uint32_t word_of(uint32_t group, uint32_t step, uint32_t index) {
  return group << 26 | step << 14 | index;
}

// Whether the time of a whole launch is up; the clock is read at few of the questions.
class Deadline {
 public:
  __device__ Deadline() : end_(global_nanoseconds() + kKernelNanoseconds) {}
  __device__ bool expired() { return ++asked_ % 256 == 0 && global_nanoseconds() > end_; }

 private:
  uint64_t end_;
  uint32_t asked_ = 0;
};

// Counts the words of a step that are not what they should be, and keeps one of the first.
template <int N>
__device__ void verify(const Task& task, uint32_t group, uint32_t step, const Place& at,
                       const Piece (&pieces)[N]) {
  uint32_t wrong = 0, index = 0, found = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t here = at.piece(k) * 4 + i;
      if (!at.has(k) || pieces[k].word[i] == word_of(group, step, here)) continue;
      ++wrong;
      index = here;
      found = pieces[k].word[i];
    }
  }
  if (wrong == 0 || atomicAdd(&task.trouble->wrong, wrong) != 0) return;
  task.trouble->step = step;
  task.trouble->index = index;
  task.trouble->found = found;
  task.trouble->expected = word_of(group, step, index);
}

// Exchange: Exchange(task, group, place); template <N> bool step(step, stain, pieces), where
// `stain` goes into every word that it sends, so that sending waits for what was got before; and
// kMayLeave, whether a CTA may leave early without the others waiting for it forever.
template <class Exchange, int N>
__device__ void exchange_steps(const Task& task) {
  const uint32_t group = blockIdx.x / task.ctas;
  const Place at = {blockIdx.x % task.ctas, task.ctas,    threadIdx.x, kThreads,
                    task.payload_words / 4, task.own_bits};
  Exchange exchange(task, group, at);
  uint32_t sum = 0, bad = 0;
  for (uint32_t step = 0; step < task.steps; ++step) {
    Piece pieces[N];
    const bool in_time = exchange.step(step, bad, pieces);
    if (!in_time) atomicAdd(&task.trouble->late, 1);
    uint32_t any = in_time ? 0 : kTop;
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
      for (const uint32_t word : pieces[k].word) {
        any |= word;
        sum += word;
      }
    }
    if (task.verify) verify(task, group, step, at, pieces);  // a branch a step where timed
    // Like the sum over warps that ends a recurrent step; and no thread goes on before all have
    // all.
    bad |= __syncthreads_or((any & kTop) != 0) ? kTop : 0;
    if (Exchange::kMayLeave && bad != 0) break;
  }
  if (bad != 0 && threadIdx.x == 0) atomicAdd(&task.trouble->wrong, 1);
  task.sums[blockIdx.x * kThreads + threadIdx.x] = sum;
  exchange.end();
}

// How a kernel is launched over the task's groups * ctas CTAs. `fits` throws where they would not
// be resident together; it is asked once, ahead of all launches.
struct Launcher {
  void (*fits)(const void* kernel, const Task& task, int shared_bytes);
  void (*launch)(const void* kernel, const Task& task, int shared_bytes);
};

// us a step: the slope between launches of all the steps and of a quarter of them, after one that
// verifies every word that every thread got. The timed launches' sums must equal that one's.
void measure_exchange(Figure& figure, const void* kernel, const Launcher& launcher, Task task,
                      int shared_bytes, const char* how);

// The kernel for the pieces that a thread gets of a payload: 1 up to 4 KB, 16 of 64 KB.
// Instances: template <int N> static const void* kernel().
template <class Instances>
const void* for_payload(uint32_t payload_words) {
  switch (payload_words / 4 / kThreads) {
    case 16:
      return Instances::template kernel<16>();
    case 8:
      return Instances::template kernel<8>();
    case 4:
      return Instances::template kernel<4>();
    case 2:
      return Instances::template kernel<2>();
    default:
      return Instances::template kernel<1>();
  }
}

}  // namespace fusedrnn::probe
