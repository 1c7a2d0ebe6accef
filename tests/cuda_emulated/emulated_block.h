// The host's twin of what csrc/cuda/block.cuh has: a block's threads as fibers of one host thread.
//
// Blocks that wait for each other are host threads side by side (run_together).
//
// A thread runs until it must wait for others, then another one does. In which order is a test's
// choice: what is right in one order only, for want of a barrier, is found so. Shared memory starts
// as NaN. Threads that wait for ever, at different places, are an error.
#pragma once

#include <algorithm>
#include <atomic>
#include <boost/context/fiber.hpp>
#include <boost/context/fixedsize_stack.hpp>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/fragment_map.h"
#include "cuda/sentinel.h"
#include "cuda/storage.h"

namespace fusedrnn {

// The nearest float that is no larger in size.
inline float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::abs(double{nearest}) > std::abs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

enum class Turns { kAscending, kDescending, kRandom };
inline Turns turns = Turns::kAscending;

// One block while it runs.
class EmulatedBlock {
 public:
  // What the lanes of a warp show each other; two, so that nobody overwrites what others still
  // read.
  struct Lane {
    float c[4];
    uint32_t a[4], b[2];
  };

  EmulatedBlock(int64_t index, int threads, int shared_bytes)
      : index(index),
        shared_(static_cast<size_t>(shared_bytes) / sizeof(Sixteen) + 1),
        threads_(threads),
        random_(static_cast<unsigned>(index)),
        warps_(threads / kWarp),
        whole_{threads} {
    if (threads % kWarp != 0) throw std::logic_error("a warp that is not whole");
    std::memset(shared_.data(), 0xFF, shared_.size() * sizeof(Sixteen));
    for (Warp& warp : warps_) warp.meeting.members = kWarp;
  }

  template <class Body>
  void run(const Body& body) {
    for (int thread = 0; thread < threads_; ++thread) start(thread, body);
    std::vector<int> order(threads_);
    std::iota(order.begin(), order.end(), 0);
    if (turns == Turns::kDescending) std::reverse(order.begin(), order.end());
    for (int left = threads_; left > 0;) {
      if (turns == Turns::kRandom) std::shuffle(order.begin(), order.end(), random_);
      const int64_t before = progress_;
      for (const int thread : order) {
        Thread& t = threads_state_[thread];
        if (!t.fiber || (t.waits_for && t.waits_for->round == t.round)) continue;
        t.fiber = std::move(t.fiber).resume();
        ++progress_;
        if (error_) std::rethrow_exception(error_);
        if (!t.fiber) --left;
      }
      if (progress_ == before) throw std::logic_error("threads of a block wait for each other");
    }
  }

  // What a device would hold at a time, how fast its clock runs, and a block that never starts.
  static inline int64_t most_together = 8, clock_rate = 1, lost = -1;

  // body(block, thread) in all threads of all blocks, which may wait for each other.
  template <class Body>
  static void run_together(int64_t blocks, int threads, int shared_bytes, const Body& body) {
    if (blocks > most_together) throw std::runtime_error("more blocks than the device can hold");
    failed_ = false;
    std::mutex mutex;
    std::exception_ptr first;
    {
      std::vector<std::jthread> running;
      for (int64_t i = 0; i < blocks; ++i) {
        if (i == lost) continue;
        running.emplace_back([&, i] {
          try {
            EmulatedBlock block(i, threads, shared_bytes);
            block.run([&](int thread) { body(block, thread); });
          } catch (...) {
            const std::lock_guard lock(mutex);
            if (!first) first = std::current_exception();
            failed_ = true;
          }
        });
      }
    }
    if (first) std::rethrow_exception(first);
  }

  char* shared() { return reinterpret_cast<char*>(shared_.data()); }

  void sync(int thread) { meet(thread, whole_, 's'); }

  float of_lane_across(int thread, float value, int mask) {
    Lane& mine = show(thread);
    mine.c[0] = value;
    meet(thread, warps_[thread / kWarp].meeting, 'x');
    return seen(thread, thread % kWarp ^ mask).c[0];
  }

  bool any_lane(int thread, bool mine) {
    show(thread).b[0] = mine;
    meet(thread, warps_[thread / kWarp].meeting, 'v');
    bool any = false;
    for (int lane = 0; lane < kWarp; ++lane) any = any || seen(thread, lane).b[0] != 0;
    return any;
  }

  Words load_relaxed(const uint32_t* from) {
    Words w;
    for (int i = 0; i < 4; ++i) {
      // atomic_ref of C++20 takes no const
      w.word[i] = std::atomic_ref(const_cast<uint32_t&>(from[i])).load(std::memory_order_relaxed);
    }
    return w;
  }
  void store_relaxed(uint32_t* to, uint32_t word) {
    if (turns == Turns::kRandom && random_() % 64 == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(random_() % 200));
    }
    std::atomic_ref(*to).store(word, std::memory_order_relaxed);
  }
  // Who asks for the time is waiting. Now and then for long: a core that all others wait on has the
  // one that they wait for.
  uint64_t nanoseconds() {
    if (failed_) throw std::runtime_error("another block has failed");
    if (++asked_ % 64 == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    } else {
      std::this_thread::yield();
    }
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(clock_rate * std::chrono::nanoseconds(now).count());
  }

  // As the PTX ISA spreads a, b and c over lanes: a register has kPerWord values, `value` widens
  // one of them. The sum is cut off, not rounded, as tensor cores do it (Fasi et al. 2021).
  template <int kPerWord, class Value>
  void multiply_add(int thread, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                    const Value& value) {
    Lane& mine = show(thread);
    std::copy(a, a + 4, mine.a);
    mine.b[0] = b0;
    mine.b[1] = b1;
    meet(thread, warps_[thread / kWarp].meeting, 'm');
    const int group = thread % kWarp / 4, quad = thread % 4;
    for (int i = 0; i < 4; ++i) {
      const int row_half = i / 2, column = 2 * quad + i % 2;
      double sum = c[i];
      for (int k = 0; k < 8 * kPerWord; ++k) {
        const int k_half = k / (4 * kPerWord), holder = k / kPerWord % 4, which = k % kPerWord;
        const float left = value(seen(thread, 4 * group + holder).a[2 * k_half + row_half], which);
        const float right = value(seen(thread, 4 * column + holder).b[k_half], which);
        sum += static_cast<double>(left) * right;
      }
      c[i] = toward_zero(sum);
    }
  }

  const int64_t index;

 private:
  using Fiber = boost::context::fiber;
  struct alignas(16) Sixteen {
    char bytes[16];
  };
  struct Meeting {
    int members = 0, arrived = 0;
    int64_t round = 0;
    char what = 0;
  };
  struct Warp {
    Meeting meeting;
    Lane shown[2][kWarp];
  };
  struct Thread {
    Fiber fiber, back;
    const Meeting* waits_for = nullptr;
    int64_t round = 0;
  };

  template <class Body>
  void start(int thread, const Body& body) {
    constexpr size_t stack = 64 << 10;
    threads_state_.resize(threads_);
    threads_state_[thread].fiber = Fiber(std::allocator_arg, boost::context::fixedsize_stack(stack),
                                         [this, thread, &body](Fiber&& back) {
                                           threads_state_[thread].back = std::move(back);
                                           try {
                                             body(thread);
                                           } catch (const boost::context::detail::forced_unwind&) {
                                             throw;  // the block is given up
                                           } catch (...) {
                                             error_ = std::current_exception();
                                           }
                                           return std::move(threads_state_[thread].back);
                                         });
  }

  Lane& show(int thread) {
    Warp& warp = warps_[thread / kWarp];
    return warp.shown[warp.meeting.round % 2][thread % kWarp];
  }
  // What a lane showed at the last meeting.
  const Lane& seen(int thread, int lane) {
    Warp& warp = warps_[thread / kWarp];
    return warp.shown[(threads_state_[thread].round) % 2][lane];
  }

  void meet(int thread, Meeting& meeting, char what) {
    if (meeting.arrived > 0 && meeting.what != what) {
      throw std::logic_error("threads of a block meet for different reasons");
    }
    Thread& t = threads_state_[thread];
    meeting.what = what;
    t.round = meeting.round;
    if (++meeting.arrived == meeting.members) {
      meeting.arrived = 0;
      ++meeting.round;
      return;
    }
    t.waits_for = &meeting;
    t.back = std::move(t.back).resume();
    t.waits_for = nullptr;
  }

  std::vector<Sixteen> shared_;
  const int threads_;
  std::mt19937 random_;
  std::vector<Warp> warps_;
  Meeting whole_;
  std::vector<Thread> threads_state_;
  int64_t progress_ = 0, asked_ = 0;
  std::exception_ptr error_;
  static inline std::atomic<bool> failed_ = false;  // one of the blocks that run together
};

// What a kernel sees of it.
class Block {
 public:
  Block(EmulatedBlock& block, int thread) : block_(block), thread_(thread) {}
  int thread() const { return thread_; }
  int64_t index() const { return block_.index; }
  char* shared() const { return block_.shared(); }
  void sync() const { block_.sync(thread_); }
  float of_lane_across(float value, int mask) const {
    return block_.of_lane_across(thread_, value, mask);
  }
  bool any_lane(bool mine) const { return block_.any_lane(thread_, mine); }
  Words load_relaxed(const uint32_t* from) const { return block_.load_relaxed(from); }
  void store_relaxed(uint32_t* to, uint32_t word) const { block_.store_relaxed(to, word); }
  uint64_t nanoseconds() const { return block_.nanoseconds(); }
  void give_up() const { throw std::runtime_error("a block waited for the others for too long"); }
  uint32_t unknown(uint32_t word) const { return word; }
  uint32_t to_tf32(uint32_t bits) const {
    const bool finite = (bits & 0x7f800000) != 0x7f800000;
    return (finite ? bits + 0x1000 : bits) & 0xffffe000;
  }
  template <class E>
  void multiply_add(E, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    block_.multiply_add<2>(thread_, c, a, b0, b1, [](uint32_t word, int which) {
      const E value = {static_cast<uint16_t>(word >> 16 * which)};
      return load(&value);
    });
  }
  void multiply_add(float, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    // What of a float is beyond TF32's bits is not looked at.
    block_.multiply_add<1>(thread_, c, a, b0, b1,
                           [](uint32_t word, int) { return float_of(word & 0xFFFFE000u); });
  }

 private:
  EmulatedBlock& block_;
  const int thread_;
};

}  // namespace fusedrnn
