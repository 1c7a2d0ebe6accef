// Exchanges through L2, among CTAs of one cooperative launch.
#include <cooperative_groups.h>

#include <algorithm>
#include <stdexcept>

#include "exchange.cuh"

namespace fusedrnn::probe {
namespace {

// What the three have in common: where the words of a step lie.
class ThroughL2 {
 public:
  __device__ ThroughL2(const Task& task, uint32_t group, const Place& at)
      : words_(task.words + static_cast<size_t>(group) * task.steps * task.payload_words),
        counter_(task.counters + group * 32),
        payload_words_(task.payload_words),
        group_(group),
        at_(at) {}

  // The protocols' ports.
  __device__ void store(uint32_t step, uint32_t index, uint32_t word) {
    store_relaxed(at(step) + index, word);
  }
  __device__ Piece load(uint32_t step, uint32_t piece) {
    return load_relaxed(at(step) + piece * 4);
  }
  __device__ void barrier() { __syncthreads(); }
  __device__ void add_release() { probe::add_release(counter_, 1); }
  __device__ uint32_t counter() { return load_acquire(counter_); }
  __device__ bool expired() { return deadline_.expired(); }

  __device__ void end() {}

 protected:
  __device__ uint32_t* at(uint32_t step) const {
    return words_ + static_cast<size_t>(step) * payload_words_;
  }
  __device__ void store_share(uint32_t step, uint32_t stain) {
    for (uint32_t i = at_.thread; i < at_.share(); i += at_.threads) {
      const uint32_t index = at_.cta * at_.share() + i;
      store_plain(at(step) + index, word_of(group_, step, index) | stain);
    }
  }
  template <int N>
  __device__ void load_all(uint32_t step, Piece (&out)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      out[k] = at_.has(k) ? load_plain(at(step) + at_.piece(k) * 4) : Piece{};
    }
  }

  uint32_t* words_;
  uint32_t* counter_;
  uint32_t payload_words_, group_;
  Place at_;
  Deadline deadline_;
};

struct GridSync : ThroughL2 {
  using ThroughL2::ThroughL2;
  static constexpr bool kMayLeave = false;  // grid.sync waits without a limit
  template <int N>
  __device__ bool step(uint32_t step, uint32_t stain, Piece (&out)[N]) {
    store_share(step, stain);
    cooperative_groups::this_grid().sync();
    load_all(step, out);
    return true;
  }
};

struct Flag : ThroughL2 {
  using ThroughL2::ThroughL2;
  static constexpr bool kMayLeave = true;
  template <int N>
  __device__ bool step(uint32_t step, uint32_t stain, Piece (&out)[N]) {
    store_share(step, stain);
    const bool in_time = flag_wait(*this, at_, step);
    load_all(step, out);
    return in_time;
  }
};

struct Sentinel : ThroughL2 {
  using ThroughL2::ThroughL2;
  static constexpr bool kMayLeave = true;
  template <int N>
  __device__ bool step(uint32_t step, uint32_t stain, Piece (&out)[N]) {
    for (uint32_t i = at_.thread; i < at_.share(); i += at_.threads) {
      const uint32_t word = word_of(group_, step, at_.cta * at_.share() + i) | stain;
      sentinel_publish(*this, at_, step, i, word);
    }
    return sentinel_gather(*this, at_, step, out);
  }
};

template <class Exchange, int N>
__global__ __launch_bounds__(kThreads, 1) void through_l2(Task task) {
  exchange_steps<Exchange, N>(task);
}

template <class Exchange>
struct Instances {
  template <int N>
  static const void* kernel() {
    return reinterpret_cast<const void*>(through_l2<Exchange, N>);
  }
};

void fits(const void* kernel, const Task& task, int shared_bytes) {
  int per_sm = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int resident = per_sm * properties().multiProcessorCount;
  if (static_cast<uint32_t>(resident) < task.groups * task.ctas) {
    throw std::runtime_error("the CTAs do not fit the GPU at once");
  }
}

void launch_cooperative(const void* kernel, const Task& task, int shared_bytes) {
  Task copy = task;
  void* arguments[] = {&copy};
  check(cudaLaunchCooperativeKernel(kernel, dim3(task.groups * task.ctas), dim3(kThreads),
                                    arguments, shared_bytes),
        "cudaLaunchCooperativeKernel");
}

struct Protocol {
  const char* name;
  const void* (*kernel)(uint32_t payload_words);
  bool in_groups;  // whether groups can exchange without each other
  const char* how;
};
constexpr Protocol kProtocols[] = {
    {"sentinel", for_payload<Instances<Sentinel>>, true,
     "st.relaxed.gpu words into a buffer of 0xFF, polled by 16-byte ld.relaxed.gpu"},
    {"flag", for_payload<Instances<Flag>>, true,
     "stores, bar.sync, red.release.gpu by one thread, ld.acquire.gpu by one, bar.sync, loads"},
    {"grid_sync", for_payload<Instances<GridSync>>, false,
     "cooperative_groups grid.sync between stores and "
     "loads"},
};

void exchange(const Protocol& protocol, uint32_t ctas, uint32_t groups, uint32_t bytes,
              uint32_t steps) {
  guarded(Figure("exchange").text("protocol", protocol.name), [&](Figure& figure) {
    Task task{};
    task.ctas = ctas;
    task.groups = groups;
    task.payload_words = bytes / 4;
    task.steps = steps;
    measure_exchange(figure, protocol.kernel(task.payload_words), {fits, launch_cooperative}, task,
                     one_cta_bytes(), protocol.how);
  });
}

// As many steps as keep all words within 16 MB, or little more, which L2 holds.
uint32_t steps_in_l2(uint32_t bytes) { return std::clamp((16u << 20) / bytes, 64u, 512u); }

}  // namespace

void exchanges() {
  warm_up();
  const uint32_t sms = static_cast<uint32_t>(properties().multiProcessorCount);
  for (uint32_t ctas : {8u, 16u, 32u, 64u, 128u}) {
    if (ctas > sms) continue;
    for (uint32_t bytes = 512; bytes <= 65536; bytes *= 2) {
      for (const Protocol& protocol : kProtocols) {
        exchange(protocol, ctas, 1, bytes, steps_in_l2(bytes));
      }
    }
  }
  // All SMs at work, in groups that do not wait for each other.
  for (uint32_t ctas : {8u, 16u, 32u, 64u}) {
    const uint32_t groups = std::min(sms / ctas, static_cast<uint32_t>(kMaxGroups));
    for (uint32_t bytes = 512; groups > 1 && bytes <= 65536; bytes *= 4) {
      for (const Protocol& protocol : kProtocols) {
        if (protocol.in_groups)
          exchange(protocol, ctas, groups, bytes, steps_in_l2(groups * bytes));
      }
    }
  }
  // A buffer for a long sequence, which L2 does not hold: 128 MB.
  for (uint32_t ctas : {16u, 64u}) {
    exchange(kProtocols[0], ctas, 1, 32768, kMaxSteps);
    exchange(kProtocols[1], ctas, 1, 32768, kMaxSteps);
  }
}

}  // namespace fusedrnn::probe
