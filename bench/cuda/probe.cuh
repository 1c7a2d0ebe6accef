// What the probe's parts share: how a figure is printed, a call checked, a kernel timed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace fusedrnn::probe {

inline constexpr int kThreads = 256;  // of a CTA: 8 warps, as the recurrent kernels have

// Throws std::runtime_error where a call failed.
void check(cudaError_t result, const char* what);

// One line of JSON: a name, what it depends on, and a value or the reason why there is none.
class Figure {
 public:
  explicit Figure(const char* name) { text("figure", name); }
  Figure& text(const char* key, const std::string& value);
  Figure& number(const char* key, double value);
  void value(double value, const char* unit, const char* how);
  void failed(const std::string& why);
  void skipped(const std::string& why) { text("skipped", why).print(); }

 private:
  void print();
  std::string fields_;
};

// Device memory, freed with the object.
class Memory {
 public:
  explicit Memory(size_t bytes) { check(cudaMalloc(&p_, bytes), "cudaMalloc"); }
  ~Memory() { cudaFree(p_); }
  Memory(const Memory&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(p_);
  }

 private:
  void* p_ = nullptr;
};

// What a kernel took on its own clocks.
struct Ticks {
  uint64_t clocks, nanoseconds;
  double mhz() const {
    return 1e3 * static_cast<double>(clocks) / static_cast<double>(nanoseconds);
  }
};

cudaDeviceProp properties();
double median(std::vector<double> values);
bool any_failed();   // whether this process has printed a figure that failed
bool out_of_time();  // whether this process has used up its share of the minute

// Microseconds of `run` on the default stream, by events: the median of `repeats` runs after one
// that is not timed. `before` is called, untimed, ahead of each.
double microseconds(
    const std::function<void()>& run, int repeats = 7, const std::function<void()>& before = [] {});

// Dynamic shared memory that leaves room for one CTA on an SM, as the recurrent kernels do.
int one_cta_bytes();

// Busies all SMs for a third of a second, so that the clock is up; its frequency then, in MHz.
double warm_up();

// The value of a figure, or the reason why it failed; leaves by exception where the context is
// dead.
void guarded(Figure figure, const std::function<void(Figure&)>& measure);

void launches();
void rates();
void l2_reads();
void exchanges();
void clusters();

}  // namespace fusedrnn::probe
