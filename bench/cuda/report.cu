// Printing, checking, timing: the host's side of the probe.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "asm.cuh"
#include "probe.cuh"

namespace fusedrnn::probe {

void check(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  cudaGetLastError();  // what does not stick is forgotten
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(result));
}

Figure& Figure::text(const char* key, const std::string& value) {
  fields_ += (fields_.empty() ? "\"" : ", \"") + std::string(key) + "\": \"";
  for (char c : value) {
    if (c == '"' || c == '\\') fields_ += '\\';
    fields_ += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  fields_ += '"';
  return *this;
}

Figure& Figure::number(const char* key, double value) {
  char buffer[40];
  std::snprintf(buffer, sizeof buffer, "%.7g", value);
  fields_ += ", \"" + std::string(key) + "\": " + (std::isfinite(value) ? buffer : "null");
  return *this;
}

void Figure::value(double value, const char* unit, const char* how) {
  number("value", value).text("unit", unit).text("how", how).print();
}

namespace {
bool failures = false;
}

bool any_failed() { return failures; }

void Figure::failed(const std::string& why) {
  failures = true;
  text("failed", why).print();
}

void Figure::print() {
  std::printf("{%s}\n", fields_.c_str());
  std::fflush(stdout);
}

cudaDeviceProp properties() {
  static const cudaDeviceProp found = [] {
    cudaDeviceProp p;
    check(cudaGetDeviceProperties(&p, 0), "cudaGetDeviceProperties");
    return p;
  }();
  return found;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

bool out_of_time() {
  using Clock = std::chrono::steady_clock;
  static const auto start = Clock::now();
  return Clock::now() - start > std::chrono::seconds(9);
}

double microseconds(const std::function<void()>& run, int repeats,
                    const std::function<void()>& before) {
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&stop), "cudaEventCreate");
  std::vector<double> found;
  for (int i = 0; i <= repeats; ++i) {
    before();
    check(cudaEventRecord(start), "cudaEventRecord");
    run();
    check(cudaEventRecord(stop), "cudaEventRecord");
    check(cudaEventSynchronize(stop), "a timed kernel");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, stop), "cudaEventElapsedTime");
    if (i > 0) found.push_back(milliseconds * 1e3);
  }
  check(cudaEventDestroy(start), "cudaEventDestroy");
  check(cudaEventDestroy(stop), "cudaEventDestroy");
  return median(found);
}

int one_cta_bytes() {
  const cudaDeviceProp p = properties();
  const size_t more_than_half = p.sharedMemPerMultiprocessor / 2 + 1024;
  return static_cast<int>(std::min(more_than_half, p.sharedMemPerBlockOptin));
}

namespace {

__global__ void busy(uint64_t nanoseconds, Ticks* ticks, float* sink) {
  const Stopwatch watch;
  float x = static_cast<float>(threadIdx.x);
  const uint64_t end = global_nanoseconds() + nanoseconds;
  while (global_nanoseconds() < end) {
    for (int i = 0; i < 1000; ++i) multiply_add(x, 0.5f, 1.0f);
  }
  watch.stop(ticks);
  if (x == -1.0f) *sink = x;  // never
}

}  // namespace

double warm_up() {
  const Memory ticks(sizeof(Ticks)), sink(sizeof(float));
  Ticks found{};
  for (uint64_t milliseconds : {250, 50}) {  // the second one's clock is the figure
    busy<<<properties().multiProcessorCount, kThreads>>>(milliseconds * 1000000, ticks.as<Ticks>(),
                                                         sink.as<float>());
    check(cudaGetLastError(), "the warm-up's launch");
    check(cudaMemcpy(&found, ticks.as<void>(), sizeof found, cudaMemcpyDeviceToHost), "warm-up");
  }
  return found.mhz();
}

void guarded(Figure figure, const std::function<void(Figure&)>& measure) {
  if (out_of_time()) return figure.skipped("this part's share of the minute is used up");
  try {
    measure(figure);
  } catch (const std::runtime_error& error) {
    figure.failed(error.what());
    check(cudaDeviceSynchronize(), "the context is lost");
  }
}

}  // namespace fusedrnn::probe
