// The host's side of an exchange's measurement.
#include "exchange.cuh"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace fusedrnn::probe {

namespace {

std::string described(const Trouble& t) {
  if (t.late != 0) return "ran out of time in " + std::to_string(t.late) + " threads";
  return std::to_string(t.wrong) + " wrong or missing words, as at step " + std::to_string(t.step) +
         " index " + std::to_string(t.index) + ": " + std::to_string(t.found) + " for " +
         std::to_string(t.expected);
}

}  // namespace

void measure_exchange(Figure& figure, const void* kernel, const Launcher& launcher, Task task,
                      int shared_bytes, const char* how) {
  const size_t threads = static_cast<size_t>(task.groups) * task.ctas * kThreads;
  const size_t payload = static_cast<size_t>(task.payload_words) * 4;
  figure.number("ctas", task.ctas)
      .number("groups", task.groups)
      .number("payload_bytes", static_cast<double>(payload))
      .number("steps", task.steps);
  const Memory words(task.groups * task.steps * payload), sums(threads * 4);
  const Memory counters(task.groups * 128), trouble(sizeof(Trouble));
  task.words = words.as<uint32_t>();
  task.counters = counters.as<uint32_t>();
  task.sums = sums.as<uint32_t>();
  task.trouble = trouble.as<Trouble>();
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "the shared memory of an exchange");
  launcher.fits(kernel, task, shared_bytes);

  const auto clear = [&](uint32_t steps) {
    const size_t bytes = task.groups * steps * payload;
    check(cudaMemsetAsync(task.words, 0xFF, bytes), "cudaMemsetAsync");
    check(cudaMemsetAsync(task.counters, 0, task.groups * 128), "cudaMemsetAsync");
    check(cudaMemsetAsync(task.sums, 0xFF, threads * 4), "cudaMemsetAsync");
    check(cudaMemsetAsync(task.trouble, 0, sizeof(Trouble)), "cudaMemsetAsync");
  };
  // The sums of a launch that went well.
  const auto result = [&] {
    check(cudaDeviceSynchronize(), "an exchange");
    Trouble found;
    check(cudaMemcpy(&found, task.trouble, sizeof found, cudaMemcpyDeviceToHost), "cudaMemcpy");
    if (found.late != 0 || found.wrong != 0) throw std::runtime_error(described(found));
    std::vector<uint32_t> got(threads);
    check(cudaMemcpy(got.data(), task.sums, threads * 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return got;
  };
  const auto timed = [&](uint32_t steps) {
    Task part = task;
    part.steps = steps;
    part.verify = true;
    clear(steps);
    launcher.launch(kernel, part, shared_bytes);
    const std::vector<uint32_t> right = result();
    part.verify = false;
    const double found = microseconds([&] { launcher.launch(kernel, part, shared_bytes); }, 7,
                                      [&] { clear(steps); });
    if (result() != right) throw std::runtime_error("the timed launch got other words");
    return found;
  };
  const uint32_t few = task.steps / 4;
  const double all = timed(task.steps), quarter = timed(few);
  figure.value((all - quarter) / (task.steps - few), "us/step", how);
}

}  // namespace fusedrnn::probe
