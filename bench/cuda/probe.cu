// What a GPU gives to recurrent kernels: one line of JSON a figure, with its unit and how it was
// taken. Needs a driver, and no torch; scripts/build_cuda_probe.sh builds it.
//
//   probe            all parts, under a minute; each in a process of its own, with a time limit, so
//                    that a lost context or a hanging driver costs one part
//   probe PART...    these alone: device launches rates l2 exchanges clusters
//
// Exit code: 0, all parts ran and no figure failed; 1, some did not; 2, there is no GPU.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "probe.cuh"

namespace fusedrnn::probe {
namespace {

void device() {
  const cudaDeviceProp p = properties();
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  Figure("device")
      .text("name", p.name)
      .number("compute_capability", p.major * 10 + p.minor)
      .number("driver_supports_cuda", driver)
      .number("cuda_runtime", runtime)
      .value(p.multiProcessorCount, "SMs", "cudaGetDeviceProperties");
  const auto reported = [](const char* name, double value, const char* unit, const char* how) {
    Figure(name).value(value, unit, how);
  };
  const auto attribute = [](const char* name, cudaDeviceAttr which, double scale,
                            const char* unit) {
    guarded(Figure(name), [&](Figure& figure) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, 0), "cudaDeviceGetAttribute");
      figure.value(value * scale, unit, "cudaDeviceGetAttribute");
    });
  };
  attribute("sm_clock_reported", cudaDevAttrClockRate, 1e-3, "MHz");
  attribute("memory_clock_reported", cudaDevAttrMemoryClockRate, 1e-3, "MHz");
  attribute("l2_size", cudaDevAttrL2CacheSize, 1, "bytes");
  const char* how = "cudaGetDeviceProperties";
  reported("memory_size", static_cast<double>(p.totalGlobalMem), "bytes", how);
  reported("shared_memory_sm", static_cast<double>(p.sharedMemPerMultiprocessor), "bytes", how);
  reported("shared_memory_cta", static_cast<double>(p.sharedMemPerBlockOptin), "bytes", how);
  reported("registers_sm", p.regsPerMultiprocessor, "registers", how);
  reported("sm_clock_measured", warm_up(), "MHz", "clock64 against globaltimer, all SMs busy");
}

struct Part {
  const char* name;
  void (*run)();
};
constexpr Part kParts[] = {{"device", device}, {"launches", launches},   {"rates", rates},
                           {"l2", l2_reads},   {"exchanges", exchanges}, {"clusters", clusters}};

constexpr unsigned kPartSeconds = 15, kAllSeconds = 58;

// In a process of its own, whose exit code is returned; stopped where it hangs.
int run_alone(const Part& part) {
  using Clock = std::chrono::steady_clock;
  static const auto start = Clock::now();
  const auto spent = std::chrono::duration_cast<std::chrono::seconds>(Clock::now() - start);
  const int64_t left = std::min<int64_t>(kPartSeconds, kAllSeconds - spent.count());
  if (left <= 0) {
    Figure(part.name).failed("the minute is used up");
    return 1;
  }
  std::fflush(stdout);
  const pid_t child = fork();
  if (child < 0) return 1;
  if (child == 0) {
    // Its default action ends the process, and the driver then its kernels.
    alarm(static_cast<unsigned>(left));
    int failed = 0;
    try {
      part.run();
    } catch (const std::exception& error) {
      Figure(part.name).failed(error.what());
      failed = 1;
    }
    std::fflush(stdout);
    _exit(failed | (any_failed() ? 1 : 0));
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFEXITED(status)) return WEXITSTATUS(status);
  Figure(part.name).failed(WTERMSIG(status) == SIGALRM ? "it hung and was stopped" : "it crashed");
  return 1;
}

}  // namespace
}  // namespace fusedrnn::probe

int main(int count, char** arguments) {
  using namespace fusedrnn::probe;
  std::vector<const Part*> wanted;
  for (const Part& part : kParts) {
    bool named = count == 1;
    for (int i = 1; i < count; ++i) named |= std::strcmp(arguments[i], part.name) == 0;
    if (named) wanted.push_back(&part);
  }
  if (static_cast<int>(wanted.size()) < count - 1) {
    std::fprintf(stderr, "usage: probe [device|launches|rates|l2|exchanges|clusters]...\n");
    return 1;
  }
  // Asked in a child: a process that has begun with CUDA must not fork.
  const Part there = {"gpu", [] {
                        int devices = 0;
                        if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) _exit(2);
                      }};
  if (run_alone(there) != 0) {
    std::fprintf(stderr, "probe: no CUDA GPU here, or no driver for it\n");
    return 2;
  }
  int failed = 0;
  for (const Part* part : wanted) failed |= run_alone(*part);
  return failed;
}
